"""What every condition promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage2_ar.conditions import Condition, build_condition, crop_prefix
from stage2_ar.conditions.base import mix_prefixes, segment_length, segments_of, take_rows
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CodesConditionConfig,
    CombinedConditionConfig,
    ConditionTokenizerConfig,
    CoordinatesConditionConfig,
    DepthConditionConfig,
    ImageConditionConfig,
    NoConditionConfig,
    SegmentationConditionConfig,
    SingleCondition,
)
from stage2_ar.conditions.objects_config import (
    ObjectFeaturesConfig,
    ObjectsConditionConfig,
    ObjectTokensConfig,
)
from stage2_ar.conditions.text_config import TextConditionConfig, WordsConfig
from stage2_ar.transformer import Transformer, build_transformer, next_code_loss
from stage2_ar.transformer_config import LlamaConfig
from taming.errors import UserError
from taming.types import Batch, Prefix

GRID, FACTOR, WIDTH, BATCH = (3, 5), 4, 16, 4
MAP_CODES = ConditionTokenizerConfig(
    input="segmentation", channels=7, codebook_size=5, downsample_factor=FACTOR, tokenizer_hash="0"
)
OBJECT_FEATURES = ObjectFeaturesConfig(hidden_width=8, frequencies=2)
WORDS = WordsConfig(vocabulary=("a", "cat", "dog", "red"), max_length=4, hidden_width=8)
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
    "depth": DepthConditionConfig(dropout=0.5, hidden_width=8),
    "image": ImageConditionConfig(channels=4, dropout=0.5, hidden_width=8),
    "image_prefix": ImageConditionConfig(dropout=0.5, hidden_width=8, placement="prefix", channels=4),
    "low_resolution": ImageConditionConfig(source="low_resolution", scale=2, dropout=0.5, hidden_width=8),
    "edges": ImageConditionConfig(source="edges", dropout=0.5, hidden_width=8),
    "codes": CodesConditionConfig(facts=MAP_CODES, dropout=0.5),
    "codes_prefix": CodesConditionConfig(facts=MAP_CODES, dropout=0.5, placement="prefix"),
    "codes_shared": CodesConditionConfig(facts=MAP_CODES, shared_vocabulary=True, placement="prefix"),
    "codes_resized": CodesConditionConfig(facts=MAP_CODES, dropout=0.5, resize=8, placement="prefix"),
    "coordinates": CoordinatesConditionConfig(dropout=0.5, hidden_width=8),
    "coordinate_tokens": CoordinatesConditionConfig(levels=8),
    "objects": ObjectsConditionConfig(num_classes=3, max_objects=4, dropout=0.5, encoding=OBJECT_FEATURES),
    "objects_alone": ObjectsConditionConfig(
        num_classes=3,
        max_objects=4,
        dropout=0.5,
        place="centre",
        encoding=OBJECT_FEATURES.model_copy(update={"aligned": False}),
    ),
    "object_tokens": ObjectsConditionConfig(
        num_classes=3, max_objects=4, dropout=0.5, encoding=ObjectTokensConfig(num_tokens=9)
    ),
    "words": TextConditionConfig(encoder=WORDS, dropout=0.5),
    "words_convolution": TextConditionConfig(
        encoder=WORDS.model_copy(update={"context": "convolution"}), dropout=0.5
    ),
    "combined": CombinedConditionConfig(
        conditions=[
            ClassConditionConfig(num_classes=6, dropout=0.3),
            SegmentationConditionConfig(num_labels=7, dropout=0.3, hidden_width=8),
            DepthConditionConfig(dropout=0.3, hidden_width=8, placement="prefix"),
        ],
        dropout=0.3,
    ),
}
PICTURES = [
    "segmentation",
    "segmentation_prefix",
    "depth",
    "image",
    "image_prefix",
    "low_resolution",
    "edges",
    "combined",
]
"""Those that are aligned with the picture: what a window is told is a crop of the whole."""
WINDOWED = [*PICTURES, "codes", "codes_prefix", "coordinates"]
TOLD = ["objects", "objects_alone", "object_tokens", "words", "words_convolution"]
DROPPED_ALONE = ["class", *TOLD, *(name for name in WINDOWED if name != "combined")]


def _build(name: str) -> tuple[Condition, Transformer]:
    torch.manual_seed(0)
    condition = build_condition(CONFIGS[name], width=WIDTH, downsample_factor=FACTOR)
    config = LlamaConfig(num_layers=1, num_heads=2, width=WIDTH)
    transformer = build_transformer(
        config, vocabulary_size=9, grid=GRID, prefix_length=condition.prefix_length(GRID)
    )
    condition.attach(transformer.token_embedding)
    return condition, transformer


def _batch(condition: Condition, grid: tuple[int, int] = GRID) -> Batch:
    """The condition's example, with something to tell samples apart by."""
    generator = torch.Generator().manual_seed(1)
    batch = {"image": torch.zeros(BATCH, 3, 4, 4), **condition.example(BATCH, grid)}
    for name, value in batch.items():
        match name:
            case "label":
                batch[name] = torch.randperm(6, generator=generator)[:BATCH]
            case "segmentation":
                batch[name] = torch.randint(7, value.shape, generator=generator)
            case "depth" | "edges":
                batch[name] = torch.rand(value.shape, generator=generator)
            case "condition_image" | "low_resolution":
                batch[name] = torch.rand(value.shape, generator=generator) * 2 - 1
            case "segmentation_codes":
                batch[name] = torch.randint(5, value.shape, generator=generator)
            case "objects":
                corners = torch.rand(BATCH, 3, 4, generator=generator) * 0.5 + torch.tensor([0, 0, 0.5, 0.5])
                batch[name] = [
                    [{"label": n, "box": tuple(box.tolist())} for n, box in enumerate(boxes[: row + 1])]
                    for row, boxes in enumerate(corners)
                ]
            case "text":
                batch[name] = ["a red cat", "a dog", "red", "cat dog a red"]
            case "crop":
                batch[name] = torch.rand(value.shape, generator=generator) * 0.4 + value * 0.5
    return batch


def _same(a: Prefix, b: Prefix) -> bool:
    assert (a.cells is None) == (b.cells is None)
    cells = a.cells is None or b.cells is None or torch.allclose(a.cells, b.cells, atol=1e-6)
    return (
        cells
        and torch.allclose(a.embeddings, b.embeddings, atol=1e-6)
        and torch.equal(a.mask, b.mask)
        and segments_of(a) == segments_of(b)
    )


def _told_of_cells(prefix: Prefix, grid: tuple[int, int]) -> torch.Tensor:
    """(B, h, w, D) of an aligned condition in either placement."""
    return prefix.embeddings.unflatten(1, grid) if prefix.cells is None else prefix.cells


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name: str) -> None:
    condition, _ = _build(name)
    condition.eval()
    for grid in (GRID, (4, 7)):
        prefix = condition(_batch(condition, grid), grid)
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
    batch = _batch(condition)
    codes = torch.randint(9, (BATCH, GRID[0] * GRID[1]))
    condition.train()
    for _ in range(10):  # often enough that each sample was once dropped and once not
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
    batch = _batch(condition)
    assert _same(condition.eval()(batch, GRID), other.eval()(batch, GRID))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_example_is_one(name: str) -> None:
    condition, _ = _build(name)
    for grid in (GRID, (2, 2)):
        example = condition.example(2, grid)
        assert {len(value) for value in example.values()} == {2}
        assert set(condition.keys.values()) <= example.keys()
        assert condition(example, grid).embeddings.shape[:2] == (2, condition.prefix_length(grid))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_is_told_the_same_in_any_batch(name: str) -> None:
    condition, _ = _build(name)
    batch = _batch(condition.eval())
    whole, part = condition(batch, GRID), condition(take_rows(batch, torch.tensor([2, 0, 2])), GRID)
    rows = [2, 0, 2]
    assert torch.allclose(part.embeddings, whole.embeddings[rows], atol=1e-6)
    assert torch.equal(part.mask, whole.mask[rows])
    if part.cells is not None and whole.cells is not None:
        assert torch.allclose(part.cells, whole.cells[rows], atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_window_of_all_is_the_whole(name: str) -> None:
    condition, _ = _build(name)
    batch = _batch(condition.eval())
    assert _same(condition.windows(batch, GRID, GRID)(0, 0), condition(batch, GRID))
    if condition.has_null:
        null = condition.null_windows(BATCH, GRID, GRID, "cpu")(0, 0)
        assert _same(null, condition.null(BATCH, GRID, "cpu"))


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_are_crops(name: str) -> None:
    condition, _ = _build(name)
    grid, size = (5, 8), (3, 4)
    batch = _batch(condition.eval(), grid)
    whole, null = condition(batch, grid), condition.null(BATCH, grid, "cpu")
    windows = condition.windows(batch, grid, size)
    null_windows = condition.null_windows(BATCH, grid, size, "cpu")
    for top, left in ((0, 0), (2, 3), (1, 4)):
        assert _same(windows(top, left), crop_prefix(whole, top, left, size))
        assert _same(null_windows(top, left), crop_prefix(null, top, left, size))
        assert windows(top, left).embeddings.shape[1] == condition.prefix_length(size)


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "combined"])
def test_inner_cells_of_a_cropped_picture_are_told_the_same(name: str) -> None:
    """Nothing that is said of a cell depends on where in the picture it lies."""
    condition, _ = _build(name)
    grid, size, (top, left) = (8, 9), (6, 6), (1, 2)
    batch = _batch(condition.eval(), grid)
    (key,) = condition.keys.values()
    pixels = batch[key].shape[-1] // grid[1]
    part = {
        key: batch[key][
            ..., top * pixels : (top + size[0]) * pixels, left * pixels : (left + size[1]) * pixels
        ]
    }
    whole = _told_of_cells(crop_prefix(condition(batch, grid), top, left, size), size)
    alone = _told_of_cells(condition(part, size), size)
    assert torch.allclose(whole[:, 2:-2, 2:-2], alone[:, 2:-2, 2:-2], atol=1e-6)
    assert not torch.allclose(whole, alone, atol=1e-6)  # at the border it knows less


@pytest.mark.parametrize("name", DROPPED_ALONE)
def test_dropout_replaces_whole_samples_in_training_only(name: str) -> None:
    condition, _ = _build(name)
    batch = _batch(condition)
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


@pytest.mark.parametrize("name", [name for name in PICTURES if name != "combined"])
def test_a_cell_knows_its_surroundings_but_not_the_far_end(name: str) -> None:
    condition, _ = _build(name)
    condition.eval()
    grid = (3, 9)
    batch = _batch(condition, grid)
    (key,) = condition.keys.values()
    before = condition(batch, grid)
    batch[key] = batch[key].clone()
    corner = batch[key][..., -1, -1]
    batch[key][..., -1, -1] = (corner + 1) % 7 if key == "segmentation" else 1 - corner.abs()
    after = condition(batch, grid)
    changed = (_told_of_cells(before, grid) != _told_of_cells(after, grid)).any(-1)[0]
    assert changed[0, 7]
    assert changed[2, 8]
    assert not changed[:, :6].any()


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
        ("depth", {"depth": torch.zeros(1, 12, 20, dtype=torch.uint8)}, r"uint8; give floats in \[0, 1\]"),
        ("depth", {"depth": torch.full((1, 12, 20), 255.0)}, r"from 255 to 255; scale it to \[0, 1\]"),
        ("depth", {"depth": torch.full((1, 12, 20), float("nan"))}, "from nan to nan"),
        ("depth", {"depth": torch.zeros(3, 12, 20)}, r"needs \(B, 1, 12, 20\)"),
        ("image", {"image": torch.zeros(1, 3, 12, 20)}, r"needs \(B, 4, 12, 20\)"),
        ("image", {"image": torch.full((1, 4, 12, 20), -3.0)}, r"scale it to \[-1, 1\]"),
        ("image", {"depth": torch.zeros(1, 12, 20)}, "no condition 'depth'; it takes 'image'"),
        ("low_resolution", {"image": torch.zeros(1, 3, 12, 20)}, r"at scale 2 needs \(B, 3, 6, 10\)"),
        ("edges", {"image": torch.zeros(1, 1, 12, 16)}, r"needs \(B, 1, 12, 20\)"),
        ("codes", {"segmentation": torch.zeros(12, 19, dtype=torch.int64)}, "12x20"),
        ("codes", {"segmentation": torch.full((12, 20), 7)}, "label 7 is not one of the 7 labels"),
        ("codes", {"segmentation": torch.zeros(12, 20, dtype=torch.int64)}, "tokenizer .* is not there"),
        ("coordinates", {"crop": [[0, 0, 1, 1]]}, "no condition 'crop'; it takes none"),
        ("objects", {"objects": []}, r"for a picture without objects give \[\[\]\]"),
        ("objects", {"objects": "cat"}, "must be a list of objects"),
        ("objects", {"objects": [[{"label": 0}]]}, "is no object; write"),
        ("objects", {"objects": [[{"label": 3, "box": [0, 0, 1, 1]}]]}, "label 3 is not one of the 3"),
        ("objects", {"objects": [[{"label": "cat", "box": [0, 0, 1, 1]}]]}, "keeps no names, give a number"),
        ("objects", {"objects": [[{"label": 0, "box": [0, 0, 1, 1.5]}]]}, "leaves the picture"),
        ("objects", {"objects": [[{"label": 0, "box": [0, 0, 0, 1]}]]}, "has no area"),
        ("objects", {"objects": [[{"label": 0, "box": [0, 0, 1]}]]}, "is not four numbers"),
        ("objects", {"objects": [[{"label": 0, "box": [0, 0, 1, 10**400]}]]}, "is not four numbers"),
        ("objects", {"objects": [{"label": 0, "box": [0, 0, 1, 1]}] * 5}, "5 objects, .* at most 4"),
        ("object_tokens", {"objects": [[{"label": -1, "box": [0, 0, 1, 1]}]]}, "label -1"),
        ("words", {"text": "a red cot"}, "'cot' is not one of the 4 .* near it are cat"),
        ("words", {"text": ["a", " "]}, "'text' is empty"),
        ("words", {"text": "?!"}, "has no words"),
        ("words", {"text": "a a a a a"}, "5 words, but the model takes at most 4"),
        ("words", {"text": [1]}, "must be a text or a list of texts"),
        ("combined", {"class": [1]}, "'segmentation' is missing"),
        ("combined", {"text": ["a cat"]}, "no condition 'text'; it takes 'class', 'segmentation', 'depth'"),
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


@pytest.mark.parametrize(
    "name", ["class", "segmentation", "depth", "image", "low_resolution", "edges", "combined", "codes", *TOLD]
)
def test_a_batch_without_the_condition(name: str) -> None:
    with pytest.raises(UserError, match="the data has none"):
        _build(name)[0]({"codes": torch.zeros(1, *GRID, dtype=torch.int64)}, GRID)


@pytest.mark.parametrize("name", ["class_without_null", "class_shared", "codes_shared", "coordinate_tokens"])
def test_no_null_without_dropout(name: str) -> None:
    condition, _ = _build(name)
    assert not condition.has_null
    with pytest.raises(UserError, match="without dropout"):
        condition.null(1, GRID, "cpu")


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
@pytest.mark.parametrize("placement", ["aligned", "prefix"])
@pytest.mark.parametrize(
    "config",
    [
        SegmentationConditionConfig(num_labels=7),
        DepthConditionConfig(),
        ImageConditionConfig(),
        ImageConditionConfig(source="low_resolution", scale=2),
        ImageConditionConfig(source="edges"),
        CoordinatesConditionConfig(),
        ObjectsConditionConfig(num_classes=3),
        TextConditionConfig(encoder=WORDS),
    ],
    ids=lambda config: getattr(config, "source", config.kind),
)
def test_half_precision_says_the_same(config: SingleCondition, factor: int, placement: str) -> None:
    """What is trained under autocast is what is sampled in fp32: oneDNN once computed another patch."""
    torch.manual_seed(0)
    if hasattr(config, "placement"):
        config = config.model_copy(update={"placement": placement})
    condition = build_condition(config, width=32, downsample_factor=factor).eval()
    batch = _batch(condition, (4, 4))
    with torch.no_grad():
        exact = condition(batch, (4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            half = condition(batch, (4, 4))
        cast = condition.bfloat16()(batch, (4, 4))
    for other in (half, cast):
        pairs = [(exact.embeddings, other.embeddings)]
        if exact.cells is not None and other.cells is not None:
            pairs.append((exact.cells, other.cells))
        for a, b in pairs:
            assert float((a - b.float()).detach().norm() / a.detach().norm()) < 0.03
