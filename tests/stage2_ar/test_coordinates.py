"""Coordinates: of the whole picture, whatever part of it is shown."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from stage1_vq import VQModel
from stage2_ar.conditions import build_condition, crop_prefix
from stage2_ar.conditions.config import CoordinatesConditionConfig
from stage2_ar.conditions.coordinates import (
    CoordinateTokensCondition,
    cell_centres,
    fourier,
    raster_map,
)
from stage2_ar.train import train
from taming.errors import ConfigError, UserError
from taming.types import Batch
from tests.conftest import ar_config, make_pipeline

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)


def test_a_crops_cells_are_those_of_the_whole() -> None:
    whole = cell_centres(WHOLE, (6, 8))
    crop = torch.tensor([[2 / 8, 1 / 6, 6 / 8, 4 / 6]], dtype=torch.float64)
    assert torch.allclose(cell_centres(crop, (3, 4)), whole[:, 1:4, 2:6])
    assert torch.allclose(whole[0, 0, 0], torch.tensor([0.5 / 6, 0.5 / 8], dtype=torch.float64))


def test_fourier_features() -> None:
    out = fourier(torch.tensor([[0.25, 0.5]], dtype=torch.float64), 2)[0].tolist()
    row, column = 0.25 * math.pi, 0.5 * math.pi
    sines = [math.sin(row), math.sin(2 * row), math.sin(column), math.sin(2 * column)]
    cosines = [math.cos(row), math.cos(2 * row), math.cos(column), math.cos(2 * column)]
    assert out == pytest.approx([0.25, 0.5, *sines, *cosines])


@pytest.mark.parametrize("levels", [None, 31])
def test_a_crop_is_told_what_the_whole_picture_says_there(levels: int | None) -> None:
    torch.manual_seed(0)
    config = CoordinatesConditionConfig(levels=levels)
    condition = build_condition(config, width=16, downsample_factor=4).eval()
    condition.attach(torch.nn.Embedding(32, 16))
    whole = condition({"key": ["a"]}, (6, 8))
    part = condition({"crop": torch.tensor([[2 / 8, 1 / 6, 6 / 8, 4 / 6]])}, (3, 4))
    window = crop_prefix(whole, 1, 2, (3, 4))
    assert torch.allclose(part.embeddings, window.embeddings)
    if part.cells is not None and window.cells is not None:
        assert torch.allclose(part.cells, window.cells, atol=1e-6)


def test_published_tokens_by_a_loop() -> None:
    """round(levels * mean over a cell of the raster index / pixels), for a crop of a larger picture."""
    height, width, factor, levels = 12, 20, 4, 63
    condition = build_condition(CoordinatesConditionConfig(levels=levels), width=8, downsample_factor=factor)
    assert isinstance(condition, CoordinateTokensCondition)
    condition.attach(torch.nn.Embedding(64, 8))
    top, left, grid = 4, 8, (2, 3)
    crop = torch.tensor([[left / width, top / height, (left + 12) / width, (top + 8) / height]]).double()
    assert raster_map(crop, (8, 12))[0, 0, 1, 2] == pytest.approx((5 * width + 10) / (height * width))
    for row in range(grid[0]):
        for column in range(grid[1]):
            places = [
                (top + row * factor + y) * width + left + column * factor + x
                for y in range(factor)
                for x in range(factor)
            ]
            expected = round(levels * sum(places) / len(places) / (height * width))
            assert condition.tokens(crop, grid)[0, row, column] == expected


def test_a_table_that_is_too_small() -> None:
    condition = build_condition(CoordinatesConditionConfig(levels=17), width=4, downsample_factor=2)
    with pytest.raises(ConfigError, match=r"levels 17 is more than the transformer's table of 16 entries"):
        condition.attach(torch.nn.Embedding(16, 4))


def test_tokens_of_huge_pictures_stay_in_the_table() -> None:
    condition = build_condition(CoordinatesConditionConfig(levels=16), width=4, downsample_factor=2)
    assert isinstance(condition, CoordinateTokensCondition)
    condition.attach(torch.nn.Embedding(16, 4))
    tokens = condition.tokens(WHOLE, (64, 2))
    assert int(tokens.max()) == 15


@pytest.mark.parametrize(
    "crop", [[[0.0, 0.0, 1.0]], [[0.5, 0.0, 0.5, 1.0]], [[0.0, 0.0, 1.5, 1.0]], [[float("nan"), 0, 1, 1]]]
)
def test_no_crop(crop: list[list[float]]) -> None:
    batch: Batch = {"crop": torch.tensor(crop)}
    for levels in (None, 8):
        condition = build_condition(CoordinatesConditionConfig(levels=levels), width=8, downsample_factor=2)
        with pytest.raises(UserError, match="crop"):
            condition(batch, (2, 2))


def test_the_pipeline_fills_them_in_at_any_size(tokenizer: VQModel) -> None:
    pipe = make_pipeline(tokenizer, {"kind": "coordinates"})
    with torch.no_grad():
        pipe.model.condition.get_parameter("out.weight").mul_(300)
    small = pipe(num_images=2, guidance_scale=1.5)
    assert small.codes.shape == (2, 4, 4)
    large = pipe(num_images=1, height=12, width=16)
    assert large.codes.shape == (1, 6, 8)
    assert torch.equal(pipe(height=12, width=16, schedule="wavefront").codes, large.codes)
    images = pipe.decode(small.codes)
    assert pipe.log_likelihood(images).shape == (2,)


def test_training_reads_where_crops_lie(tokenizer: VQModel, tmp_path: Path) -> None:
    tokenizer.save_pretrained(f"{tmp_path}/t")
    data = {"kind": "scenes", "size": 16, "crop_from": 32, "num_train": 12, "num_validation": 6}
    config = ar_config(tokenizer=f"{tmp_path}/t", data=data, condition={"kind": "coordinates"})
    assert train(config, tmp_path / "run").steps == 4
