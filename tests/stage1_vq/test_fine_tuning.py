"""A run from a saved model: what may differ, what may not, and codes that stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage1_vq.fine_tuning import TRAINING_ONLY, start_from
from stage1_vq.quantizers import QuantizerConfig
from stage1_vq.task import VQTask
from stage1_vq.train import train
from taming.config import build_config
from taming.errors import ConfigError, UserError
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_config

QUANTIZERS: dict[str, dict[str, Any]] = {
    "nearest": {"kind": "nearest", "kmeans_init": True, "revive_after": 1},
    "ema": {"kind": "ema", "revive_after": 1, "revive_below": 0.5},
    "gumbel": {"kind": "gumbel"},
    "simvq": {"kind": "simvq", "kmeans_init": True, "revive_after": 1},
    "ibq": {"kind": "ibq", "revive_after": 1},
    "residual": {"kind": "residual", "codes_per_stage": 4, "revive_after": 1, "code_dim": 8},
    "fsq": {"kind": "fsq", "levels": [4, 3]},
    "lfq": {"kind": "lfq", "num_bits": 4, "entropy_group_bits": 4},
    "bsq": {"kind": "bsq", "num_bits": 4, "entropy_group_bits": 4},
}
MEANING = {"kind", "codebook_size", "code_dim", "l2_normalised", "levels", "num_bits", "num_stages"}
MEANING |= {"codes_per_stage"}


def values(quantizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    table = quantizer["kind"] in ("nearest", "ema", "gumbel", "simvq", "ibq")
    sizes = {"codebook_size": 16, "code_dim": 8} if table else {}
    return {**TINY_MODEL, "dropout": 0.2, "quantizer": {**quantizer, **sizes}, **changes}


def test_every_option_of_every_quantizer_is_known_to_move_meanings_or_not() -> None:
    kinds = get_args(get_args(QuantizerConfig)[0])
    assert {kind.model_fields["kind"].default for kind in kinds} == QUANTIZERS.keys()
    options = {f"quantizer.{name}" for kind in kinds for name in kind.model_fields}
    assert options - TRAINING_ONLY == {f"quantizer.{name}" for name in MEANING}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_training_the_decoder_only_keeps_all_codes(tmp_path: Path, images: Tensor, kind: str) -> None:
    model = values(QUANTIZERS[kind])
    start = VQModel.from_pretrained(train(vq_config(model=model), tmp_path / "first").model)
    config = vq_config(
        model=model,
        init_from=str(tmp_path / "first"),
        train_only="decoder",
        training={**TINY_TRAINING, "ema_decay": 0.5},
    )
    tuned = VQModel.from_pretrained(train(config, tmp_path / "second").model)
    assert torch.equal(start.encode(images), tuned.encode(images))
    before, after = start.state_dict(), tuned.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.split(".")[0] for key in moved} == {"decoder", "post_quant_conv"}
    # A run that was stopped goes on with the same choice of weights.
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 6})})
    again = VQModel.from_pretrained(train(longer, tmp_path / "second").model)
    assert torch.equal(start.encode(images), again.encode(images))
    assert again.content_hash() != tuned.content_hash()


def test_frozen_parts_have_no_optimiser_state(tmp_path: Path) -> None:
    VQModel(build_config(VQModelConfig, TINY_MODEL)).save_pretrained(tmp_path)
    task = VQTask(vq_config(init_from=str(tmp_path), train_only="decoder"))
    wanted = {name.split(".")[0] for name, p in task.model.named_parameters() if p.requires_grad}
    assert wanted == {"decoder", "post_quant_conv"}


def test_what_only_concerns_training_may_differ(tmp_path: Path) -> None:
    start = VQModel(build_config(VQModelConfig, values({"kind": "nearest"}, attention_resolutions=[8])))
    start.save_pretrained(tmp_path)
    other = values(
        {**QUANTIZERS["nearest"], "beta": 0.5, "gradient": "rotation"},
        resolution=32,
        attention_resolutions=[16],  # the same level of a larger picture
        dropout=0.0,
        recompute=False,
    )
    model = VQModel(build_config(VQModelConfig, other))
    start_from(model, str(tmp_path))
    for key, value in start.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert bool(model.quantize.initialised), "k-means would move codes that are in use"
    model.save_pretrained(tmp_path / "healthy")
    start_from(start, str(tmp_path / "healthy"))  # and back, to a model without these buffers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_channels": 16}, "z_channels: 8 there, 16 here"),
        ({"attention_resolutions": [8]}, r"attention at levels: \[\] there, \[1\] here"),
        ({"quantizer": {"kind": "ema"}}, "quantizer.kind: nearest there, ema here"),
        ({"quantizer": {"l2_normalised": True}}, "quantizer.l2_normalised: False there, True here"),
        ({"in_channels": 1}, "in_channels: 3 there, 1 here"),
        ({"input": "condition_image"}, "input: image there, condition_image here"),
        ({"norm_num_groups": 2}, "norm_num_groups: 4 there, 2 here"),
    ],
)
def test_what_changes_the_weights_is_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    VQModel(build_config(VQModelConfig, TINY_MODEL)).save_pretrained(tmp_path)
    quantizer = {**TINY_MODEL["quantizer"], **changes.pop("quantizer", {})}
    other = VQModel(build_config(VQModelConfig, {**TINY_MODEL, **changes, "quantizer": quantizer}))
    with pytest.raises(UserError, match=message):
        start_from(other, str(tmp_path))


def test_train_only_needs_a_start() -> None:
    with pytest.raises(ConfigError, match="say which with init_from"):
        vq_config(train_only="decoder")
