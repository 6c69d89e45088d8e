"""A run from a saved pipeline: what is taken over, what begins anew, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.config import ARModelConfig
from stage2_ar.fine_tuning import check_start, start_from
from stage2_ar.model import ARModel
from stage2_ar.train import train
from taming.config import build_config
from taming.errors import UserError
from tests.conftest import ar_config, make_pipeline

CLASS = {"kind": "class", "num_classes": 5}
MAPS = {"kind": "segmentation", "num_labels": 7, "hidden_width": 8, "label_dim": 4}
SHAPE: dict[str, Any] = {"kind": "llama", "num_layers": 2, "num_heads": 2, "width": 16}
GPT: dict[str, Any] = {**SHAPE, "kind": "gpt"}


@pytest.fixture
def source(tokenizer: VQModel, tmp_path: Path) -> str:
    make_pipeline(tokenizer, CLASS).save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def model_of(tokenizer: VQModel, **changes: Any) -> ARModel:
    values = {
        "transformer": SHAPE,
        "condition": CLASS,
        "vocabulary_size": 16,
        "grid": [4, 4],
        "downsample_factor": 2,
        "tokenizer_hash": tokenizer.codes_hash(),
    }
    torch.manual_seed(9)
    return ARModel(build_config(ARModelConfig, {**values, **changes}))


def same(model: ARModel, source: str) -> set[str]:
    """Names of the weights that are those of the source."""
    there = ARModel.from_pretrained(source, subfolder="transformer").state_dict()
    own = model.state_dict()
    return {
        name
        for name, value in own.items()
        if name in there and there[name].shape == value.shape and torch.equal(value, there[name])
    }


def test_the_same_model_is_taken_over_whole(tokenizer: VQModel, source: str) -> None:
    model = model_of(tokenizer, transformer={**SHAPE, "residual_dropout": 0.3, "mlp_width": 64})
    assert start_from(model, source) == []
    assert same(model, source) == model.state_dict().keys()


def test_a_run_is_a_source_too(tokenizer: VQModel, tmp_path: Path) -> None:
    make_pipeline(tokenizer, CLASS).save_pretrained(tmp_path / "run/model")
    assert start_from(model_of(tokenizer), str(tmp_path / "run")) == []


@pytest.mark.parametrize(
    ("condition", "anew"),
    [
        (MAPS, ["condition"]),
        ({"kind": "none"}, ["condition"]),
        ({**CLASS, "num_classes": 8}, ["condition.embedding"]),
        ({**CLASS, "dropout": 0.5}, []),
        ({**CLASS, "dropout": 0.0}, []),
    ],
)
def test_another_condition_begins_anew(
    tokenizer: VQModel, source: str, condition: dict[str, Any], anew: list[str]
) -> None:
    model = model_of(tokenizer, condition=condition)
    assert start_from(model, source) == anew
    taken = same(model, source)
    assert {name for name in model.state_dict() if name.startswith("transformer.")} <= taken
    if "condition" in anew:
        assert not any(name.startswith("condition.") for name in taken)


def test_a_part_of_a_condition_begins_anew(tokenizer: VQModel, tmp_path: Path) -> None:
    make_pipeline(tokenizer, MAPS).save_pretrained(tmp_path / "start")
    model = model_of(tokenizer, condition={**MAPS, "num_labels": 9})
    assert start_from(model, str(tmp_path / "start")) == ["condition.label_embedding"]
    assert "condition.out.weight" in same(model, str(tmp_path / "start"))


def test_rotary_grids_may_differ(tokenizer: VQModel, source: str) -> None:
    model = model_of(tokenizer, grid=[6, 8])
    assert start_from(model, source) == []
    assert same(model, source) == model.state_dict().keys()


def test_target_positions_begin_at_nothing(tokenizer: VQModel, source: str) -> None:
    model = model_of(tokenizer, transformer={**SHAPE, "target_positions": True})
    assert start_from(model, source) == ["transformer.target_embedding"]
    before = ARModel.from_pretrained(source, subfolder="transformer")
    codes, batch = torch.randint(16, (2, 4, 4)), {"label": torch.tensor([1, 4])}
    torch.testing.assert_close(model.eval()(codes, batch), before(codes, batch))


def test_another_order_is_told(tokenizer: VQModel, source: str) -> None:
    model = model_of(tokenizer, order={"kind": "spiral_in"})
    assert start_from(model, source) == ["the order of writing (raster there, spiral_in here)"]


def test_learned_positions_follow_their_cells(tokenizer: VQModel, tmp_path: Path) -> None:
    start = ARPipeline(model_of(tokenizer, transformer=GPT), tokenizer)
    start.save_pretrained(tmp_path / "start")
    aligned = model_of(tokenizer, transformer=GPT, condition={"kind": "none"})
    assert start_from(aligned, str(tmp_path / "start")) == ["condition"]  # as many positions before the cells
    longer = model_of(tokenizer, transformer=GPT, condition={**MAPS, "placement": "prefix"})
    anew = start_from(longer, str(tmp_path / "start"))
    assert anew == ["condition", "the condition's learned positions"]
    table, before = longer.transformer.position_embedding, start.model.transformer.position_embedding
    assert table is not None
    assert before is not None
    assert torch.equal(table[:, 16:], before[:, 1:])


def test_the_codes_of_a_larger_table_are_taken(tokenizer: VQModel, tmp_path: Path) -> None:
    large = model_of(tokenizer, transformer={**GPT, "table_size": 20, "block_size": 30})
    ARPipeline(large, tokenizer).save_pretrained(tmp_path / "start")
    model = model_of(tokenizer, transformer=GPT)
    assert start_from(model, str(tmp_path / "start")) == []
    assert torch.equal(model.transformer.head.weight, large.transformer.head.weight[:16])
    assert torch.equal(
        model.transformer.token_embedding.weight, large.transformer.token_embedding.weight[:16]
    )
    codes, batch = torch.randint(16, (2, 4, 4)), {"label": torch.tensor([1, 4])}
    torch.testing.assert_close(model.eval()(codes, batch), large.eval()(codes, batch))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer_hash": "another"}, "its codes mean something else; .*tokenizer=.*/tokenizer"),
        ({"vocabulary_size": 32}, "writes 16 codes .* this run has 32"),
        ({"transformer": {**SHAPE, "num_layers": 3}}, "num_layers: 2 there, 3 here.*copy these keys"),
        ({"transformer": {**SHAPE, "rotary_base": 50.0}}, "rotary_base"),
        ({"transformer": GPT}, "kind: llama there, gpt here"),
    ],
)
def test_what_would_not_mean_the_same_is_refused(
    tokenizer: VQModel, source: str, changes: dict[str, Any], message: str
) -> None:
    model = model_of(tokenizer, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        check_start(model.config, source)
    with pytest.raises(UserError, match=message):
        start_from(model, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_target_positions_are_not_left_out(tokenizer: VQModel, tmp_path: Path) -> None:
    start = model_of(tokenizer, transformer={**SHAPE, "target_positions": True})
    ARPipeline(start, tokenizer).save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match="target_positions: True there, absent here"):
        start_from(model_of(tokenizer), str(tmp_path / "start"))


def test_learned_positions_of_another_grid_are_refused(tokenizer: VQModel, tmp_path: Path) -> None:
    ARPipeline(model_of(tokenizer, transformer=GPT), tokenizer).save_pretrained(tmp_path / "start")
    with pytest.raises(UserError, match=r"learned positions of 4x4 cells.* train on pictures of 8x8"):
        start_from(model_of(tokenizer, transformer=GPT, grid=[8, 8]), str(tmp_path / "start"))


def test_a_run_tells_what_is_new_and_trains_the_condition_alone(
    tokenizer: VQModel, source: str, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = ar_config(
        tokenizer=str(tmp_path / "tokenizer"),
        transformer={**SHAPE, "residual_dropout": 0.2},
        init_from=source,
        train_only="condition",
    )
    result = train(config, tmp_path / "run")
    assert result.notes == (f"step 1: started from {source}; new: condition",)
    tuned = ARPipeline.from_pretrained(result.model).model
    there = ARModel.from_pretrained(source, subfolder="transformer").state_dict()
    assert all(
        torch.equal(value, there[f"transformer.{name}"])
        for name, value in tuned.transformer.state_dict().items()
    )
    # A run that goes on says it no more, and still holds the transformer.
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 6})})
    again = train(longer, tmp_path / "run")
    assert again.notes == ()
    other = ARPipeline.from_pretrained(again.model).model
    assert torch.equal(other.transformer.head.weight, tuned.transformer.head.weight)
    assert not torch.equal(other.condition.out.weight, tuned.condition.out.weight)


def test_a_condition_without_weights_cannot_be_trained_alone(tokenizer: VQModel, tmp_path: Path) -> None:
    start = ARPipeline(
        model_of(tokenizer, transformer=GPT, condition={"kind": "none", "start_token": 0}), tokenizer
    )
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = ar_config(
        tokenizer=str(tmp_path / "tokenizer"),
        data={"kind": "scenes", "size": 8, "num_train": 12, "num_validation": 6},
        transformer=GPT,
        condition={"kind": "none", "start_token": 0},
        init_from=str(tmp_path / "start"),
        train_only="condition",
    )
    with pytest.raises(UserError, match="has no weights of its own"):
        train(config, tmp_path / "run")
