"""Sliding windows: their places, and the same picture by every schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stage2_ar.conditions.base import crop_prefix
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import SamplingSettings, draw, picture_uniforms, sample_codes, stack_prefixes
from stage2_ar.sampling.sliding_window import (
    WindowPrefix,
    place_windows,
    sample_sliding,
    wavefront,
    window_size,
)
from stage2_ar.transformer import Transformer
from taming.errors import UserError
from taming.types import Prefix
from tests.stage2_ar.small import VOCABULARY, WIDTH, random_prefix, small_transformer

MODEL_GRID = (4, 4)
Schedule = Literal["serial", "wavefront"]


def _windows(whole: Prefix, grid: tuple[int, int]) -> WindowPrefix:
    size = window_size(MODEL_GRID, grid)
    return lambda top, left: crop_prefix(whole, top, left, size)


def _gridded_prefix(batch: int, grid: tuple[int, int], seed: int = 0) -> Prefix:
    whole = random_prefix(batch, length=grid[0] * grid[1], grid=grid, seed=seed)
    return replace(whole, cells=None, segments=(grid,))


def _published_procedure(
    model: Transformer,
    prefix: Prefix,
    null: Prefix,
    grid: tuple[int, int],
    uniforms: Tensor,
    choice: SamplingSettings,
    stride: int,
) -> Tensor:
    """Every cell from a whole window: nothing trimmed, nothing kept."""
    window = window_size(MODEL_GRID, grid)
    codes = torch.zeros(uniforms.shape[0], *grid, dtype=torch.int64)
    for place in place_windows(grid, window, stride):
        rows, columns = slice(place.top, place.top + window[0]), slice(place.left, place.left + window[1])
        inside = codes[:, rows, columns].flatten(1)
        local = (place.row - place.top) * window[1] + place.column - place.left
        both = stack_prefixes(
            crop_prefix(prefix, place.top, place.left, window),
            crop_prefix(null, place.top, place.left, window),
        )
        with torch.no_grad():
            logits = model(torch.cat((inside, inside)), both, window)[:, local]
        uniform = uniforms[:, place.row * grid[1] + place.column]
        codes[:, place.row, place.column] = draw(guided(logits, choice.guidance_scale), uniform, choice)
    return codes


@pytest.mark.parametrize("size", [16, 17, 20, 31, 40])
def test_windows_are_placed_as_published(size: int) -> None:
    for place in place_windows((size, size), (16, 16)):
        for index, origin in ((place.row, place.top), (place.column, place.left)):
            local = index if index <= 8 else 16 - (size - index) if size - index < 8 else 8
            assert index - local == origin


@given(
    height=st.integers(1, 9), width=st.integers(1, 20), h=st.integers(1, 6), w=st.integers(1, 8),
    stride=st.integers(1, 8),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_a_cell_lies_in_its_window_and_after_all_that_it_needs(
    height: int, width: int, h: int, w: int, stride: int
) -> None:
    grid, window = (height, width), window_size((h, w), (height, width))
    stride = min(stride, window[1])
    places = place_windows(grid, window, stride)
    steps = wavefront(places, grid, window, set())
    when = {(place.row, place.column): time for time, step in enumerate(steps) for place in step}
    assert len(when) == height * width
    for place in places:
        assert 0 <= place.row - place.top < window[0]
        assert 0 <= place.column - place.left < window[1]
        assert 0 <= place.top <= height - window[0]
        assert 0 <= place.left <= width - window[1]
        for row in range(place.top, place.row + 1):
            stop = place.column if row == place.row else place.left + window[1]
            assert all(
                when[row, column] < when[place.row, place.column] for column in range(place.left, stop)
            )


def test_wavefront_takes_the_steps_that_it_should() -> None:
    steps = wavefront(place_windows((64, 64), (16, 16)), (64, 64), (16, 16), set())
    assert len(steps) == 16 * 63 + 64


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("placement", ["cells", "grid"])
@pytest.mark.parametrize("grid", [(7, 9), (3, 9), (6, 3)])
def test_every_schedule_draws_the_published_picture(kind: str, placement: str, grid: tuple[int, int]) -> None:
    if placement == "cells":
        model = small_transformer(kind, 3, MODEL_GRID)
        prefix, null = random_prefix(2, grid=grid), random_prefix(2, grid=grid, seed=1)
    else:
        model = small_transformer(kind, 16, MODEL_GRID)
        prefix, null = _gridded_prefix(2, grid), _gridded_prefix(2, grid, seed=1)
    choice = SamplingSettings(top_k=8, guidance_scale=1.5)
    uniforms = picture_uniforms(0, 0, 2, grid[0] * grid[1])
    for stride in (1, 2):
        if stride > min(grid[1], 4):
            continue
        expected = _published_procedure(model, prefix, null, grid, uniforms, choice, stride)
        for schedule in ("serial", "wavefront"):
            codes = sample_sliding(
                model, _windows(prefix, grid), _windows(null, grid), grid, uniforms, choice,
                schedule=schedule, stride=stride,
            )  # fmt: skip
            assert torch.equal(codes, expected), (schedule, stride)


def test_a_stride_matters_and_a_grid_of_the_models_size_needs_no_window() -> None:
    model = small_transformer("gpt", 3, MODEL_GRID)
    prefix = random_prefix(1, grid=(6, 12))
    uniforms = picture_uniforms(0, 0, 1, 72)
    results = [
        sample_sliding(
            model, _windows(prefix, (6, 12)), None, (6, 12), uniforms, SamplingSettings(), stride=stride
        )
        for stride in (1, 4)
    ]
    assert not torch.equal(*results)
    small = random_prefix(1, grid=MODEL_GRID)
    uniforms = picture_uniforms(0, 0, 1, 16)
    plain = sample_codes(model, small, None, MODEL_GRID, uniforms, SamplingSettings())
    slid = sample_sliding(model, _windows(small, MODEL_GRID), None, MODEL_GRID, uniforms, SamplingSettings())
    assert torch.equal(plain, slid)


@pytest.mark.parametrize("schedule", ["serial", "wavefront"])
def test_known_cells_stay(schedule: Schedule) -> None:
    grid = (6, 9)
    model, prefix = small_transformer("llama", 3, MODEL_GRID), random_prefix(2, grid=grid)
    uniforms = picture_uniforms(0, 0, 2, 54)

    def sample(known: tuple[Tensor, Tensor] | None) -> Tensor:
        return sample_sliding(
            model,
            _windows(prefix, grid),
            None,
            grid,
            uniforms,
            SamplingSettings(),
            known=known,
            schedule=schedule,
        )

    free = sample(None)
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    mask[:, 2:4, 3:6] = True
    mask[0, 0, 0] = True
    assert torch.equal(sample((free, mask)), free)
    wanted = (free + 1) % VOCABULARY
    codes = sample((wanted, mask))
    assert torch.equal(codes[mask], wanted[mask])
    assert torch.equal(codes[1, 0, :3], free[1, 0, :3])
    assert not torch.equal(codes[~mask], free[~mask])


def test_strides_out_of_range() -> None:
    for stride in (0, 5):
        with pytest.raises(UserError, match=f"window stride {stride} is not between 1 and"):
            place_windows((8, 8), MODEL_GRID, stride)


def test_cropping_a_prefix() -> None:
    embeddings = torch.arange(12.0)[None, :, None].expand(1, 12, WIDTH)
    whole = Prefix(embeddings, torch.ones(1, 12, dtype=torch.bool), torch.randn(1, 3, 4, WIDTH), ((3, 4),))
    part = crop_prefix(whole, 1, 2, (2, 2))
    assert part.embeddings[0, :, 0].tolist() == [6, 7, 10, 11]
    assert part.segments == ((2, 2),)
    assert part.cells is not None
    assert whole.cells is not None
    assert torch.equal(part.cells, whole.cells[:, 1:, 2:])
