"""Every kind of decoder: its last gradient, its state in steps that are cut or left out, files, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig, VQTrainConfig
from stage1_vq.fine_tuning import start_from
from stage1_vq.interop.codebook import export_codebook
from stage1_vq.interop.diffusers import export_diffusers
from stage1_vq.interop.exported import comparison_inputs
from stage1_vq.interop.onnx import export_onnx
from stage1_vq.loss import adaptive_weight
from stage1_vq.optimizers import autoencoder_optimizers
from stage1_vq.task import VQTask
from stage1_vq.tiling import decode, decode_tiled, encode_tiled
from stage1_vq.train import check, describe, train
from taming.config import build_config
from taming.errors import ArtifactError, ConfigError, UserError
from taming.gan.forward_state import ForwardState
from taming.gan.losses import generator_loss
from taming.layers.spectral_norm import spectral_norms
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_config, vq_values
from tests.end_to_end.test_exact_resume import stop_in_step_five

LOCAL = {"mode": "window", "widths": [1], "until": [0.5]}
DECODERS: dict[str, dict[str, Any]] = {
    "cnn": {"kind": "cnn"},
    "sagan": {"kind": "sagan", "channels": 8, "multipliers": [2, 1], "attention": {"resolutions": [8]}},
    "transgan": {
        "kind": "transgan",
        "widths": [32, 8],
        "depths": [1, 1],
        "num_heads": 2,
        "locality": LOCAL,
        "token_noise": False,
    },
    "vitgan": {
        "kind": "vitgan",
        "width": 16,
        "num_heads": 2,
        "depth": 1,
        "patch_size": 2,
        "style_dim": 8,
        "implicit_width": 8,
    },
    "stransgan": {
        "kind": "stransgan",
        "widths": [16, 16, 16],
        "depths": [1, 1, 2],
        "num_heads": 2,
        "window": 4,
        "windowed_from": 16,
    },
}
NETWORKS: dict[str, dict[str, Any]] = {
    "patchgan": {"kind": "patchgan", "channels": 4, "num_layers": 1, "norm": "group"},
    "stylegan": {"kind": "stylegan", "channels": 4, "max_channels": 8, "num_layers": 2},
    "sagan": {"kind": "sagan", "channels": 8, "multipliers": [1, 2], "attention": {"resolutions": [8]}},
    "transgan": {"kind": "transgan", "patch_widths": [8, 8], "depths": [1, 1], "num_heads": 2},
    "vitgan": {"kind": "vitgan", "width": 16, "num_heads": 2, "depth": 1},
    "stransgan": {
        "kind": "stransgan",
        "widths": [8, 16],
        "depths": [1, 1],
        "num_heads": 2,
        "window": 4,
        "stem_halvings": 1,
        "head_dim": 16,
    },
}
GAN_DECODERS = [kind for kind in DECODERS if kind != "cnn"]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def model_values(kind: str, **changes: Any) -> dict[str, Any]:
    return {**TINY_MODEL, "recompute": False, "decoder": DECODERS[kind] | changes}


def make_model(kind: str, **changes: Any) -> VQModel:
    torch.manual_seed(0)
    return VQModel(build_config(VQModelConfig, model_values(kind, **changes)))


def settings(kind: str, network: str = "patchgan", **changes: Any) -> VQTrainConfig:
    values: dict[str, Any] = {
        "model": model_values(kind),
        "discriminator": {"network": NETWORKS[network]},
        "training": TINY_TRAINING | {"clip_norm": None, "ema_decay": None},
    }
    return vq_config(**(values | changes))


def make_task(config: VQTrainConfig, precision: str = "no", steps: int = 10) -> VQTask:
    torch.manual_seed(0)
    task = VQTask(config)
    task.prepare(Accelerator(cpu=True, mixed_precision=precision), steps)
    return task


@pytest.mark.parametrize("kind", DECODERS)
def test_the_last_gradient_is_autograds_and_all_weights_get_one(kind: str, images: Tensor) -> None:
    model = make_model(kind).train()
    output = model(images)
    assert output.reconstruction.shape == images.shape
    wanted = torch.randn(images.shape)
    (expected,) = torch.autograd.grad(output.reconstruction, model.last_layer, wanted, retain_graph=True)
    before = copy.deepcopy(model.decoder.state_dict())
    found = model.decoder.last_gradient(output.features, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.decoder.state_dict().items())
    output.reconstruction.square().sum().backward()
    names = [name for name, p in model.named_parameters() if p.grad is None]
    assert [name for name in names if not name.startswith("quantize.")] == []


@pytest.mark.parametrize("kind", DECODERS)
def test_it_is_saved_and_loaded_and_does_not_decide_the_codes(
    kind: str, images: Tensor, tmp_path: Path
) -> None:
    model = make_model(kind)
    model(images)  # in train mode: what moves with a forward is saved too
    model.eval().save_pretrained(tmp_path)
    again = VQModel.from_pretrained(tmp_path)
    codes = model.encode(images)
    assert torch.equal(model.decode(codes), again.decode(codes))
    assert again.content_hash() == model.content_hash()
    other = make_model("cnn")
    encoding = {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in ("decoder",)}
    other.load_state_dict(other.state_dict() | encoding)
    assert other.codes_hash() == model.codes_hash()
    assert (other.content_hash() == model.content_hash()) == (kind == "cnn")


@pytest.mark.parametrize("kind", GAN_DECODERS)
def test_a_cut_step_is_the_whole_step(kind: str, images: Tensor) -> None:
    """Adaptive weight and all: against the published order of work on the whole batch."""
    decoder = DECODERS[kind] | ({"norm": "group"} if kind == "sagan" else {})
    config = settings(kind, "sagan", model=model_values(kind) | {"decoder": decoder})
    task = make_task(config)
    model, critic = copy.deepcopy(task.model), copy.deepcopy(task.adversary.discriminator)
    logs = task.train_step([{"image": part} for part in images.split(2)], 2)

    model.decoder.before_step(0.2)
    output = model.train()(images)
    nll = (output.reconstruction - images).abs().mean()
    g_loss = generator_loss(critic(output.reconstruction))
    weight = 0.8 * adaptive_weight(nll, g_loss, model.last_layer)
    (nll + weight * g_loss + output.quantizer.loss).backward()
    torch.testing.assert_close(logs["adaptive_weight"], weight, rtol=1e-4, atol=0)
    found = dict(task.model.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = parameter.grad
        if wanted is not None:
            assert (found[name].grad - wanted).norm() <= 1e-3 * max(wanted.norm(), 1e-2), name
    # The power iterations went as far as in one forward of the whole.
    vectors = spectral_norms(model.decoder)
    assert (len(vectors) > 0) == (kind == "sagan")
    for name, norm in spectral_norms(task.model.decoder).items():
        torch.testing.assert_close(norm._u, vectors[name]._u)


def test_a_repeated_forward_counts_once_and_a_step_left_out_not_at_all(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("sagan", training=TINY_TRAINING | {"on_nonfinite": "skip", "ema_decay": 0.5})
    task = make_task(config)
    task.train_step([{"image": part} for part in images.split(2)], 2)
    counts = [v for k, v in task.model.decoder.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counts
    assert all(count == 2 for count in counts)  # two micro-batches, each painted twice but for the last
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    monkeypatch.setattr(
        "stage1_vq.passes.reconstruction_loss", lambda *args: _times(float("nan"), _real_loss(*args))
    )
    assert task.train_step([{"image": part} for part in images.split(2)], 3) == {}
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())


def _real_loss(*args: Any) -> Any:
    from stage1_vq.loss import reconstruction_loss

    return reconstruction_loss(*args)


def _times(factor: float, loss: Any) -> Any:
    return loss._replace(total=loss.total * factor)


def test_the_average_keeps_its_spectral_norms_and_follows_the_schedule(images: Tensor) -> None:
    config = settings("sagan", training=TINY_TRAINING | {"ema_decay": 0.9}, optimizer={"learning_rate": 1e-2})
    task = make_task(config)
    for step in range(8):
        task.train_step([{"image": images}], step)
    averaged = task.ema.module.decoder
    for name in spectral_norms(averaged):
        weight = averaged.get_submodule(name.removesuffix(".parametrizations.weight.0")).weight
        sigma = torch.linalg.matrix_norm(weight.detach().flatten(1), 2).item()
        assert sigma == pytest.approx(1, abs=0.05), name
    local = make_task(settings("transgan", training=TINY_TRAINING | {"ema_decay": 0.9}))
    for step, width in ((0, 1), (5, -1)):
        local.train_step([{"image": images}], step)
        for model in (local.model, local.ema.module):
            widths = [v for k, v in model.decoder.state_dict().items() if k.endswith("width")]
            assert [int(value) for value in widths] == [width]


@pytest.mark.parametrize(("kind", "network"), [("vitgan", "stransgan"), ("stransgan", "vitgan")])
def test_a_step_in_half_precision_is_finite(kind: str, network: str, images: Tensor) -> None:
    task = make_task(settings(kind, network), "bf16")
    for step in range(1, 3):
        logs = task.train_step([{"image": images}], step)
    assert {"adaptive_weight", "adversarial", "discriminator"} <= logs.keys()
    assert all(torch.isfinite(value) for value in logs.values())


def test_muon_leaves_it_to_adam() -> None:
    model = make_model("vitgan")
    config = vq_config(optimizer={"learning_rate": 1e-3, "method": "muon"}).optimizer
    groups = autoencoder_optimizers(model, config)["model_hidden"].param_groups
    moved = {view.data_ptr() for group in groups for view in group["params"]}
    names = {n.split(".")[0] for n, weight in model.named_parameters() if weight.data_ptr() in moved}
    assert names == {"encoder"}


@pytest.mark.parametrize("kind", GAN_DECODERS)
def test_another_decoder_is_trained_for_codes_that_stay(kind: str, images: Tensor, tmp_path: Path) -> None:
    start = make_model("cnn").eval()
    start.save_pretrained(tmp_path)
    config = settings(kind, init_from=str(tmp_path), train_only="decoder")
    task = make_task(config)
    (note, *_) = task.notes()
    assert f"decoder of kind {kind} starts anew" in note
    task.train_step([{"image": images}], 0)
    assert task.model.codes_hash() == start.codes_hash()
    assert torch.equal(task.model.eval().encode(images), start.encode(images))
    with pytest.raises(UserError, match=r"with train_only=decoder, model\.decoder may be another"):
        start_from(task.model, str(tmp_path))


def test_a_decoder_that_was_trained_begins_at_the_end_of_its_schedule(images: Tensor, tmp_path: Path) -> None:
    make_model("transgan").save_pretrained(tmp_path)
    task = make_task(settings("transgan", init_from=str(tmp_path)))
    task.train_step([{"image": images}], 0)
    assert [int(v) for k, v in task.model.decoder.state_dict().items() if k.endswith("width")] == [-1]


@pytest.mark.parametrize("kind", GAN_DECODERS)
def test_sizes_and_tiles_that_it_does_not_paint(kind: str, images: Tensor) -> None:
    model = make_model(kind).eval()
    codes = model.encode(torch.cat((images, images), dim=3))
    assert codes.shape == (4, 8, 16)
    assert model.decoder.only_size == ((16, 16) if kind in ("transgan", "vitgan") else None)
    if model.decoder.only_size is None:
        model.check_painted_size(16, 32)
        assert model.decode(codes).shape == (4, 3, 16, 32)
    else:
        for call in (lambda: model.decode(codes), lambda: model.check_painted_size(16, 32)):
            with pytest.raises(UserError, match="paints pictures of 16x16 only, not 16x32"):
                call()
    codes = model.encode(images)
    assert torch.equal(encode_tiled(model, images, tile=8), codes)
    assert torch.equal(decode(model, codes), model.decode(codes))
    for call in (lambda: decode(model, codes, tile=8), lambda: decode_tiled(model, codes)):
        with pytest.raises(UserError, match=f"decoder of kind {kind} paints pictures as a whole"):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"kind": "scenes", "size": 32}},
            r"32x32 does not suit a decoder of kind vitgan .*; set data.size=16 or model.resolution=32",
        ),
        ({"discriminator": {"network": NETWORKS["vitgan"] | {"patch_size": 5}}}, "data.size: .*16x16"),
    ],
)
def test_a_run_that_cannot_be_is_refused_first(changes: dict[str, Any], message: str) -> None:
    values = vq_values(model=model_values("vitgan")) | changes
    with pytest.raises(UserError, match=message):
        check(build_config(VQTrainConfig, values))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (model_values("vitgan") | {"input": "segmentation"}, "paints pictures, not the logits of labels"),
        (model_values("sagan") | {"resolution": 18, "patch_size": 4}, "is not divisible by the downsample"),
        (model_values("stransgan", widths=[16], depths=[1]), "decoder, at resolution 16: "),
        (TINY_MODEL | {"decoder": {"kind": "gan"}}, "'gan' is not one of the kinds 'cnn', 'sagan'"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(VQModelConfig, model)


@pytest.mark.parametrize("kind", GAN_DECODERS)
def test_exports_say_what_they_cannot_say(kind: str, tmp_path: Path) -> None:
    model = make_model(kind).eval()
    inputs = comparison_inputs(model, size=(16, 16), limit=2)
    with pytest.raises(ArtifactError, match=f"decoder.kind is {kind}"):
        export_diffusers(model, tmp_path / "diffusers", inputs)
    if kind != "sagan":
        with pytest.raises(ArtifactError, match=f"decoder of kind {kind} has no onnx export"):
            export_onnx(model, tmp_path / "onnx", inputs)
    if model.decoder.only_size is not None:
        with pytest.raises(UserError, match="16x16 only, not 32x32"):
            comparison_inputs(model, size=(32, 32))
    report = export_codebook(model, tmp_path / "codebook", inputs)
    assert report.equal_codes == 1


def test_a_dry_run_counts_it() -> None:
    facts = describe(settings("transgan", "transgan"))
    wanted = sum(p.numel() for p in make_model("transgan").parameters())
    assert f"{wanted:,} autoencoder" in facts["parameters"]


def test_what_is_left_out_of_the_state_is_tables_alone() -> None:
    """The state that a step takes back covers all that a forward in train mode moves."""
    for kind in GAN_DECODERS:
        model = make_model(kind).train()
        state = ForwardState(model.decoder)
        before = copy.deepcopy(model.decoder.state_dict())
        model(torch.rand(2, 3, 16, 16))
        state.restore()
        assert all(torch.equal(before[key], value) for key, value in model.decoder.state_dict().items())


FACTORS = (4, 8, 16)
PAIRINGS = [
    (kind, list(NETWORKS)[(place + 2 * turn) % len(NETWORKS)], factor)
    for turn, factor in enumerate(FACTORS)
    for place, kind in enumerate(DECODERS)
]
"""Each decoder with three discriminators, each of which comes at least once at some factor."""


def _pairing(kind: str, network: str, factor: int) -> VQTrainConfig:
    size = 4 * factor
    levels = factor.bit_length() - 1
    decoders: dict[str, dict[str, Any]] = {
        "cnn": {"kind": "cnn"},
        "sagan": {
            "kind": "sagan",
            "channels": 8,
            "multipliers": [2] * levels + [1],
            "attention": {"resolutions": [8]},
        },
        "transgan": {
            "kind": "transgan",
            "widths": [32] * levels + [8],
            "depths": [1] * (levels + 1),
            "num_heads": 2,
            "window": 8,
            "window_from": 16,
        },
        "vitgan": DECODERS["vitgan"] | {"patch_size": factor},
        "stransgan": {
            "kind": "stransgan",
            "widths": [16] * (levels + 1),
            "depths": [1] * (levels + 1),
            "num_heads": 2,
            "window": 4,
            "windowed_from": 8,
        },
    }
    network_values = dict(NETWORKS[network])
    if network == "sagan":
        network_values["attention"] = {"resolutions": [size // 2]}
    return vq_config(
        data={"kind": "scenes", "size": size, "num_train": 16, "num_validation": 4},
        model={
            **TINY_MODEL,
            "resolution": size,
            "channel_multipliers": [1] * (levels + 1),
            "decoder": decoders[kind],
        },
        discriminator={"network": network_values, "start_step": 20, "weight": 0.1},
        optimizer={"learning_rate": 3e-3, "betas": [0.5, 0.99]},
        training=TINY_TRAINING | {"steps": 60, "ema_decay": None},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "network", "factor"), PAIRINGS)
def test_any_pairing_trains(kind: str, network: str, factor: int) -> None:
    config = _pairing(kind, network, factor)
    check(config)
    task = make_task(config, steps=60)
    images = torch.nn.functional.interpolate(
        torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1, scale_factor=factor
    )
    before = task.evaluate([{"image": images}])["psnr"]
    for step in range(60):
        logs = task.train_step([{"image": images}], step)
        assert all(torch.isfinite(value) for value in logs.values())
    assert {"adaptive_weight", "discriminator"} <= logs.keys()
    assert task.evaluate([{"image": images}])["psnr"] > before + 0.5


@pytest.mark.slow
def test_sagan_exports_to_onnx(tmp_path: Path) -> None:
    model = make_model("sagan").eval()
    report = export_onnx(model, tmp_path / "onnx", comparison_inputs(model, size=(16, 32), limit=3))
    assert report.equal_codes == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", GAN_DECODERS)
def test_a_run_of_it_resumes_exactly(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(kind, kind, training=TINY_TRAINING | {"steps": 6})
    stop_in_step_five(monkeypatch, lambda run: train(config, run), tmp_path)
