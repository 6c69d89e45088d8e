"""What every condition promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage2_ar.conditions import Condition, build_condition, crop_prefix
from stage2_ar.conditions.base import mix_prefixes, segment_length, segments_of
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    NoConditionConfig,
    SegmentationConditionConfig,
)
from stage2_ar.transformer import Transformer, build_transformer, next_code_loss
from stage2_ar.transformer_config import LlamaConfig
from taming.errors import UserError
from taming.types import Batch

GRID, FACTOR, WIDTH, BATCH = (3, 5), 4, 16, 4
CONFIGS: dict[str, Any] = {
    "none": NoConditionConfig(),
    "none_shared": NoConditionConfig(start_token=2),
    "class": ClassConditionConfig(num_classes=6, dropout=0.5),
    "class_without_null": ClassConditionConfig(num_classes=6, dropout=0.0),
    "class_shared": ClassConditionConfig(num_classes=6, shared_vocabulary=True),
    "segmentation": SegmentationConditionConfig(num_labels=7, dropout=0.5, hidden_width=8),
    "segmentation_prefix": SegmentationConditionConfig(
        num_labels=7, dropout=0.5, hidden_width=8, placement="prefix"
    ),
}


def _build(name: str) -> tuple[Condition, Transformer]:
    torch.manual_seed(0)
    condition = build_condition(CONFIGS[name], width=WIDTH, downsample_factor=FACTOR)
    config = LlamaConfig(num_layers=1, num_heads=2, width=WIDTH)
    transformer = build_transformer(
        config, vocabulary_size=9, grid=GRID, prefix_length=condition.prefix_length(GRID)
    )
    condition.attach(transformer.token_embedding)
    return condition, transformer


def _batch(grid: tuple[int, int] = GRID) -> Batch:
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, grid[0] * FACTOR, grid[1] * FACTOR)
    return {
        "image": torch.zeros(BATCH, 3, *shape[1:]),
        "label": torch.randint(6, (BATCH,), generator=generator),
        "segmentation": torch.randint(7, shape, generator=generator),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str) -> None:
    condition, _ = _build(name)
    condition.eval()
    for grid in (GRID, (4, 7)):
        prefix = condition(_batch(grid), grid)
        assert prefix.embeddings.shape == (BATCH, condition.prefix_length(grid), WIDTH)
        assert prefix.mask.shape == prefix.embeddings.shape[:2]
        assert prefix.mask.dtype == torch.bool
        assert prefix.cells is None or prefix.cells.shape == (BATCH, *grid, WIDTH)
        assert sum(map(segment_length, segments_of(prefix))) == prefix.embeddings.shape[1]
        if condition.has_null:
            null = condition.null(BATCH, grid, "cpu")
            assert null.embeddings.shape == prefix.embeddings.shape
            assert (null.cells is None) == (prefix.cells is None)
            assert null.segments == prefix.segments


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name: str) -> None:
    condition, transformer = _build(name)
    batch = _batch()
    batch["label"] = torch.arange(BATCH)
    codes = torch.randint(9, (BATCH, GRID[0] * GRID[1]))
    condition.train()
    for _ in range(6):  # often enough that each sample was once dropped and once not
        next_code_loss(transformer(codes, condition(batch, GRID)), codes).backward()
    missing = [key for key, p in condition.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("name", CONFIGS)
def test_state_round_trips(name: str) -> None:
    condition, transformer = _build(name)
    state = condition.state_dict()
    assert not any(value is transformer.token_embedding.weight for value in condition.parameters())
    other = build_condition(CONFIGS[name], width=WIDTH, downsample_factor=FACTOR)
    other.load_state_dict(state)
    other.attach(transformer.token_embedding)
    a, b = condition.eval()(_batch(), GRID), other.eval()(_batch(), GRID)
    assert torch.equal(a.embeddings, b.embeddings)


@pytest.mark.parametrize("name", ["class", "segmentation", "segmentation_prefix"])
def test_dropout_replaces_whole_samples_in_training_only(name: str) -> None:
    condition, _ = _build(name)
    batch = _batch()
    condition.eval()
    kept, null = condition(batch, GRID), condition.null(BATCH, GRID, "cpu")
    assert torch.equal(kept.embeddings, condition(batch, GRID).embeddings)
    condition.train()
    counts = {"kept": 0, "dropped": 0}
    for _ in range(20):
        mixed = condition(batch, GRID)
        for row in range(BATCH):
            key = "cells" if mixed.cells is not None else "embeddings"
            value = getattr(mixed, key)[row]
            is_kept = torch.allclose(value, getattr(kept, key)[row])
            is_null = torch.allclose(value, getattr(null, key)[row])
            assert is_kept != is_null
            counts["kept" if is_kept else "dropped"] += 1
    assert min(counts.values()) > 15
    chosen = mix_prefixes(torch.tensor([True, False, False, True]), null, kept)
    assert torch.equal(chosen.embeddings[1], kept.embeddings[1])
    assert torch.equal(chosen.embeddings[3], null.embeddings[3])


@pytest.mark.parametrize("name", ["segmentation", "segmentation_prefix"])
def test_a_cell_knows_its_surroundings_but_not_the_far_end(name: str) -> None:
    condition, _ = _build(name)
    condition.eval()
    grid = (3, 9)
    batch = _batch(grid)
    before = condition(batch, grid)
    batch["segmentation"] = batch["segmentation"].clone()
    batch["segmentation"][:, -1, -1] = (batch["segmentation"][:, -1, -1] + 1) % 7
    after = condition(batch, grid)
    if before.cells is not None and after.cells is not None:
        changed = (before.cells != after.cells).any(-1)[0]
    else:
        changed = (before.embeddings != after.embeddings).any(-1)[0].view(grid)
    assert changed[0, 7]
    assert changed[2, 8]
    assert not changed[:, :6].any()


def test_a_window_of_features_is_a_crop_of_the_whole_map() -> None:
    condition, _ = _build("segmentation")
    whole = condition.eval()(_batch((6, 8)), (6, 8))
    window = crop_prefix(whole, 2, 3, (3, 5))
    assert whole.cells is not None
    assert window.cells is not None
    assert torch.equal(window.cells, whole.cells[:, 2:5, 3:8])
    assert torch.equal(window.embeddings, whole.embeddings)


@pytest.mark.parametrize(
    ("name", "conditions", "message"),
    [
        ("class", {"class": [6]}, r"class 6 is not one of the 6 classes \(0 to 5\)"),
        ("class", {"class": [-1]}, "class -1"),
        ("class", {"class": [0.5]}, "whole numbers"),
        ("class", {"class": [[1]]}, r"\(1, 1\) are not \(B,\)"),
        ("class", {"class": []}, "holds torch.float32|empty"),
        ("class", {"class": "cat"}, "not an array of numbers"),
        ("class", {}, "'class' is missing"),
        ("class", {"label": [1]}, "no condition 'label'; it takes 'class'"),
        ("none", {"class": [1]}, "no condition 'class'; it takes none"),
        ("segmentation", {"segmentation": torch.zeros(12, 19, dtype=torch.int64)}, "12x20"),
        ("segmentation", {"segmentation": torch.full((12, 20), 300)}, "label 300 is not one of the 7 labels"),
        ("segmentation", {"segmentation": torch.zeros(1, 1, 12, 20, dtype=torch.int64)}, "does not fit"),
    ],
)
def test_bad_input_is_named(name: str, conditions: dict[str, Any], message: str) -> None:
    condition, _ = _build(name)
    with pytest.raises(UserError, match=message):
        condition(condition.read(conditions), GRID)


def test_user_values_get_their_batch_axis() -> None:
    assert _build("class")[0].read({"class": 3})["label"].tolist() == [3]
    read = _build("segmentation")[0].read({"segmentation": torch.zeros(12, 20, dtype=torch.uint8)})
    assert read["segmentation"].shape == (1, 12, 20)
    assert read["segmentation"].dtype == torch.int64


@pytest.mark.parametrize("name", ["class", "segmentation"])
def test_a_batch_without_the_condition(name: str) -> None:
    with pytest.raises(UserError, match="the data has none"):
        _build(name)[0]({"image": torch.zeros(1, 3, 12, 20)}, GRID)


@pytest.mark.parametrize("name", ["class_without_null", "class_shared"])
def test_no_null_without_dropout(name: str) -> None:
    condition, _ = _build(name)
    assert not condition.has_null
    with pytest.raises(UserError, match="without dropout"):
        condition.null(1, GRID, "cpu")


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("placement", ["aligned", "prefix"])
def test_half_precision_says_the_same(factor: int, placement: str) -> None:
    """What is trained under autocast is what is sampled in fp32: oneDNN once computed another patch."""
    torch.manual_seed(0)
    config = SegmentationConditionConfig.model_validate({"num_labels": 7, "placement": placement})
    condition = build_condition(config, width=32, downsample_factor=factor).eval()
    batch = {"segmentation": torch.randint(7, (4, 4 * factor, 4 * factor))}
    with torch.no_grad():
        exact = condition(batch, (4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            half = condition(batch, (4, 4))
    pairs = [(exact.embeddings, half.embeddings)]
    if exact.cells is not None and half.cells is not None:
        pairs.append((exact.cells, half.cells))
    for a, b in pairs:
        assert float((a - b.float()).detach().norm() / a.detach().norm()) < 0.03
