"""Drawing codes: the filters against a plain loop, the streams, the cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_ar.conditions.base import crop_prefix
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import (
    SamplingSettings,
    draw,
    filtered_probabilities,
    picture_uniforms,
    sample_codes,
)
from taming.errors import UserError
from taming.types import Prefix
from tests.stage2_ar.small import CONFIGS, GRID, VOCABULARY, random_prefix, small_transformer

CELLS = GRID[0] * GRID[1]


def _rows(prefix: Prefix, rows: slice) -> Prefix:
    cells = None if prefix.cells is None else prefix.cells[rows]
    return replace(prefix, embeddings=prefix.embeddings[rows], mask=prefix.mask[rows], cells=cells)


def _filtered_by_loop(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> list[float]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = order[: top_k or len(order)]
    weights = {i: math.exp(logits[i] / temperature) for i in kept}
    total = sum(weights.values())
    probabilities, mass = [0.0] * len(logits), 0.0
    for i in kept:
        if top_p is None or mass < top_p:
            probabilities[i] = weights[i] / total
        mass += weights[i] / total
    scale = sum(probabilities)
    return [p / scale for p in probabilities]


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.3, 3.0),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.05, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_filters_against_a_plain_loop(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    ours = filtered_probabilities(logits, SamplingSettings(temperature, top_k, top_p))
    expected = torch.tensor(_filtered_by_loop(logits.tolist(), temperature, top_k, top_p))
    torch.testing.assert_close(ours / ours.sum(), expected, atol=1e-5, rtol=1e-4)


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.1, 0.0, 0.4, 0.5]).log().expand(5, 4)
    uniforms = torch.tensor([0.0, 0.099, 0.101, 0.499, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniforms, SamplingSettings()).tolist() == [0, 0, 2, 2, 3]
    # What was filtered away is never drawn, not even by the largest number there is.
    assert draw(logits, uniforms, SamplingSettings(top_k=1)).tolist() == [3] * 5
    first = torch.tensor([0.6, 0.3, 0.1]).log()[None]
    assert draw(first, uniforms[-1:], SamplingSettings(top_k=2)).tolist() == [1]


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.2, 0.2, 0.1])
    uniforms = picture_uniforms(3, 0, 1, 20000)[0]
    drawn = draw(probabilities.log().expand(20000, 4), uniforms, SamplingSettings())
    torch.testing.assert_close(drawn.bincount() / 20000, probabilities, atol=0.015, rtol=0)


def test_a_picture_keeps_its_random_numbers() -> None:
    together = picture_uniforms(7, 0, 5, 12)
    assert torch.equal(together[3:], picture_uniforms(7, 3, 2, 12))
    assert len({float(x) for x in together.flatten()}) == 60
    assert not torch.equal(together, picture_uniforms(8, 0, 5, 12))
    assert together.dtype == torch.float64


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_cached_equals_uncached(kind: str, guidance_scale: float, masked: bool) -> None:
    model = small_transformer(kind)
    prefix, null = random_prefix(3), random_prefix(3, seed=1)
    if masked:
        mask = prefix.mask.clone()
        mask[1, 0] = mask[2, 1] = False
        prefix = replace(prefix, mask=mask)
    choice = SamplingSettings(temperature=0.9, top_k=8, top_p=0.95, guidance_scale=guidance_scale)
    uniforms = picture_uniforms(0, 0, 3, CELLS)
    cached = sample_codes(model, prefix, null, GRID, uniforms, choice)
    uncached = sample_codes(model, prefix, null, GRID, uniforms, choice, cached=False)
    assert torch.equal(cached, uncached)
    assert len(cached.unique()) > 3


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_prefix_on_a_grid_and_without_cells(kind: str) -> None:
    model = small_transformer(kind, prefix_length=CELLS)
    embeddings = random_prefix(2, length=CELLS).embeddings
    prefix = Prefix(embeddings, torch.ones(2, CELLS, dtype=torch.bool), segments=(GRID,))
    for grid, given_prefix in ((GRID, prefix), ((2, 3), crop_prefix(prefix, 0, 1, (2, 3)))):
        uniforms = picture_uniforms(0, 0, 2, grid[0] * grid[1])
        cached = sample_codes(model, given_prefix, None, grid, uniforms, SamplingSettings())
        uncached = sample_codes(model, given_prefix, None, grid, uniforms, SamplingSettings(), cached=False)
        assert torch.equal(cached, uncached)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_batch_of_eight_equals_eight_of_one(kind: str) -> None:
    model, prefix = small_transformer(kind), random_prefix(8)
    uniforms = picture_uniforms(5, 0, 8, CELLS)
    together = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings(top_k=9))
    for row in range(8):
        rows = slice(row, row + 1)
        alone = sample_codes(
            model, _rows(prefix, rows), None, GRID, uniforms[rows], SamplingSettings(top_k=9)
        )
        assert torch.equal(alone, together[rows])


def test_guidance_of_one_is_none_and_larger_guides() -> None:
    conditional, unconditional = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.5]])
    scaled = guided(torch.cat((conditional, unconditional)), 2.0)
    torch.testing.assert_close(scaled, torch.tensor([[2.0, -0.5]]))
    same = guided(torch.cat((conditional, unconditional)), 1.0)
    torch.testing.assert_close(same, conditional)
    model, prefix, null = small_transformer("llama"), random_prefix(2), random_prefix(2, seed=1)
    uniforms = picture_uniforms(0, 0, 2, CELLS)
    plain = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings())
    assert torch.equal(
        plain, sample_codes(model, prefix, null, GRID, uniforms, SamplingSettings(guidance_scale=1))
    )
    unconditional_codes = sample_codes(model, null, None, GRID, uniforms, SamplingSettings())
    zero = sample_codes(model, prefix, null, GRID, uniforms, SamplingSettings(guidance_scale=0))
    assert torch.equal(zero, unconditional_codes)
    with pytest.raises(UserError, match="guidance_scale"):
        sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings(guidance_scale=2))


def test_known_cells_stay_and_are_conditioned_on() -> None:
    model, prefix = small_transformer("gpt"), random_prefix(2)
    uniforms = picture_uniforms(0, 0, 2, CELLS)
    free = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings())
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    mask[:, 0], mask[0, 1, 2] = True, True
    wanted = (free + 1) % VOCABULARY
    for cached in (True, False):
        codes = sample_codes(
            model, prefix, None, GRID, uniforms, SamplingSettings(), known=(wanted, mask), cached=cached
        )
        assert torch.equal(codes[mask], wanted[mask])
        assert not torch.equal(codes[~mask], free[~mask])
    # Giving what would have been drawn changes nothing.
    same = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings(), known=(free, mask))
    assert torch.equal(same, free)
    everything = torch.ones_like(mask)
    same = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings(), known=(wanted, everything))
    assert torch.equal(same, wanted)


def test_greedy_takes_the_most_probable() -> None:
    model, prefix = small_transformer("gpt"), random_prefix(1)
    codes = sample_codes(
        model, prefix, None, GRID, picture_uniforms(0, 0, 1, CELLS), SamplingSettings(greedy=True)
    ).flatten(1)
    with torch.no_grad():
        assert torch.equal(model(codes, prefix).argmax(-1), codes)


def test_progress_counts_cells() -> None:
    seen: list[tuple[int, int]] = []
    sample_codes(
        small_transformer("gpt"), random_prefix(1), None, GRID, picture_uniforms(0, 0, 1, CELLS),
        SamplingSettings(), progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(n + 1, CELLS) for n in range(CELLS)]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (SamplingSettings(temperature=0), "temperature 0"),
        (SamplingSettings(temperature=float("nan")), "temperature nan"),
        (SamplingSettings(top_k=0), "top_k 0"),
        (SamplingSettings(top_p=0.0), "top_p 0.0"),
        (SamplingSettings(top_p=1.1), "top_p 1.1"),
        (SamplingSettings(guidance_scale=float("inf")), "guidance_scale inf"),
    ],
)
def test_settings_out_of_range(choice: SamplingSettings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choice.validate(VOCABULARY)
