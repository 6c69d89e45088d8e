"""Sampling with an attention window: cached as uncached, serial as wavefront, at any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage2_ar.conditions.config import SegmentationConditionConfig
from stage2_ar.config import ARModelConfig
from stage2_ar.model import ARModel
from stage2_ar.pipeline import ARPipeline
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.inference import for_inference
from stage2_ar.sampling.sample import (
    SamplingSettings,
    draw,
    picture_uniforms,
    sample_codes,
    stack_prefixes,
)
from stage2_ar.sampling.windowed import lag_of, sample_windowed, steps_of
from stage2_ar.transformer import Transformer
from stage2_ar.transformer_config import LlamaConfig
from stage2_ar.windowed_attention import WindowCache, WindowPrefill
from taming.errors import UserError
from taming.types import Prefix
from tests.stage2_ar.small import VOCABULARY
from tests.stage2_ar.test_windowed_attention import windowed_prefix, windowed_transformer

GUIDED = SamplingSettings(top_k=8, guidance_scale=1.5)


def _uncached(
    model: Transformer, prefix: Prefix, null: Prefix, grid: tuple[int, int], uniforms: Tensor
) -> Tensor:
    """Cell after cell from the whole sequence."""
    codes = torch.zeros(len(uniforms), grid[0] * grid[1], dtype=torch.int64)
    both = stack_prefixes(prefix, null)
    with torch.no_grad():
        for n in range(codes.shape[1]):
            logits = model(torch.cat((codes, codes))[:, : n + 1], both, grid)[:, -1]
            codes[:, n] = draw(guided(logits, 1.5), uniforms[:, n], GUIDED)
    return codes.view(-1, *grid)


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("grid", [(3, 4), (2, 2), (1, 1), (1, 6), (5, 1), (6, 9)])
def test_every_schedule_draws_what_the_whole_sequence_says(
    window: tuple[int, int], grid: tuple[int, int]
) -> None:
    model = windowed_transformer(window)
    prefix, null = windowed_prefix(2, grid), windowed_prefix(2, grid, seed=1)
    uniforms = picture_uniforms(0, 0, 2, grid[0] * grid[1])
    expected = _uncached(model, prefix, null, grid, uniforms)
    for schedule in ("serial", "wavefront"):
        codes = sample_windowed(model, prefix, null, grid, uniforms, GUIDED, schedule=schedule)
        assert torch.equal(codes, expected), schedule
    for cached in (True, False):
        assert torch.equal(sample_codes(model, prefix, null, grid, uniforms, GUIDED, cached=cached), expected)


def test_prepared_for_inference_it_draws_the_same() -> None:
    grid = (4, 9)
    model, prefix = windowed_transformer((2, 2)), windowed_prefix(2, grid)
    uniforms = picture_uniforms(0, 0, 2, 36)
    results = [
        sample_windowed(part, prefix, None, grid, uniforms, SamplingSettings(), schedule="wavefront")
        for part in (model, for_inference(model, torch.float32, 2))
    ]
    assert torch.equal(*results)
    half = for_inference(model, torch.bfloat16, 2)
    codes = sample_windowed(half, prefix, None, grid, uniforms, SamplingSettings(), schedule="wavefront")
    assert codes.shape == (2, 4, 9)
    assert int(codes.max()) < VOCABULARY


@pytest.mark.parametrize("lag", [1, 3, 8])
def test_steps_take_in_every_input_once_and_after_what_it_sees(lag: int) -> None:
    grid = (5, 8)
    steps = steps_of(grid, lag)
    when = {place: time for time, step in enumerate(steps) for place in step}
    assert len(when) == sum(len(step) for step in steps) == 5 * 9 - 1
    for (row, column), time in when.items():
        if row:
            assert time >= when[row - 1, min(column + lag, 8)]
        if column:
            assert time == when[row, column - 1] + 1


def test_a_wavefront_takes_the_steps_that_it_should_and_its_ring_no_more_rows_for_height() -> None:
    model = windowed_transformer((8, 7))
    lag = lag_of(model, (64, 64), "wavefront")
    assert len(steps_of((64, 64), lag)) == 63 * 8 + 64
    assert max(len(step) for step in steps_of((64, 64), lag)) == 9
    assert len(steps_of((64, 64), lag_of(model, (64, 64), "serial"))) == 64 * 64
    prefix = windowed_prefix(1, (2, 2))
    sizes = []
    for active in (1, 9):
        cache = WindowCache(8 + active, 65, None)
        model.answer(prefix.embeddings, WindowPrefill(cache))
        sizes.append(cache.keys[0].shape[2])
    assert sizes == [9 * 65, 17 * 65]


@pytest.mark.parametrize("schedule", ["serial", "wavefront"])
def test_known_cells_stay(schedule: Literal["serial", "wavefront"]) -> None:
    grid = (6, 9)
    model, prefix = windowed_transformer((2, 2)), windowed_prefix(2, grid)
    uniforms = picture_uniforms(0, 0, 2, 54)

    def sample(known: tuple[Tensor, Tensor] | None) -> Tensor:
        return sample_windowed(
            model, prefix, None, grid, uniforms, SamplingSettings(), known=known, schedule=schedule
        )

    free = sample(None)
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    mask[:, 2:4, 3:6] = True
    mask[0, 0, 0] = True
    assert torch.equal(sample((free, mask)), free)
    wanted = (free + 1) % VOCABULARY
    codes = sample((wanted, mask))
    assert torch.equal(codes[mask], wanted[mask])
    assert torch.equal(codes[1, 0], free[1, 0])
    assert not torch.equal(codes[~mask], free[~mask])


def _into(seen: list[tuple[int, ...]]) -> Callable[[int, int], None]:
    return lambda done, total: seen.append((done, total))


def test_progress_and_refusals() -> None:
    grid = (3, 5)
    model, prefix = windowed_transformer((2, 2)), windowed_prefix(1, grid)
    uniforms = picture_uniforms(0, 0, 1, 15)
    for schedule in ("serial", "wavefront"):
        seen: list[tuple[int, ...]] = []
        sample_windowed(
            model, prefix, None, grid, uniforms, SamplingSettings(), schedule=schedule,
            progress=_into(seen),
        )  # fmt: skip
        assert seen[0] == (1, 15)
        assert seen[-1] == (15, 15)
        assert seen == sorted(seen)
    with pytest.raises(UserError, match="trained with dropout"):
        sample_windowed(model, prefix, None, grid, uniforms, GUIDED)
    gridded = replace(windowed_prefix(1, grid, length=15), segments=(grid,))
    with pytest.raises(UserError, match=r"use condition\.placement=aligned"):
        sample_windowed(model, gridded, None, grid, uniforms, SamplingSettings())


def test_a_pipeline_writes_any_size_and_knows_no_stride(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = VQModel(
        VQModelConfig(
            channels=32,
            channel_multipliers=[1, 1],
            num_res_blocks=1,
            resolution=8,
            z_channels=4,
            attention_resolutions=[],
        )
    )
    model = ARModel(
        ARModelConfig(
            transformer=LlamaConfig(num_layers=2, num_heads=2, width=16, attention_window=(2, 2)),
            condition=SegmentationConditionConfig(num_labels=3, hidden_width=8),
            vocabulary_size=tokenizer.spec.codebook_size, grid=(4, 4), downsample_factor=2,
            tokenizer_hash=tokenizer.codes_hash(),
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.transformer.head.weight, std=1.0)
    ARPipeline(model, tokenizer).save_pretrained(tmp_path)
    pipe = ARPipeline.from_pretrained(tmp_path)
    for height, width in ((8, 8), (12, 20)):
        maps = torch.randint(3, (1, height, width))
        outs = [
            pipe({"segmentation": maps}, height=height, width=width, guidance_scale=2.0, schedule=schedule)
            for schedule in ("serial", "wavefront")
        ]
        assert outs[0].images.shape == (1, 3, height, width)
        assert torch.equal(outs[0].codes, outs[1].codes)
        likelihood = pipe.log_likelihood(outs[0].images, {"segmentation": maps})
        assert torch.isfinite(likelihood).all()
    with pytest.raises(UserError, match="window stride 2 is of sliding windows"):
        pipe({"segmentation": maps}, height=12, width=20, window_stride=2)
