"""Orders of writing: permutations, and a transformer that keeps to them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from stage2_ar.order import (
    OrderConfig,
    OrderKind,
    cells_in_order,
    inverse,
    restricted,
    to_raster,
    to_sequence,
)
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.sampling.sliding_window import sample_sliding
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.errors import ConfigError, UserError
from tests.stage2_ar.small import GRID, VOCABULARY, WIDTH, random_prefix

KINDS = [kind for kind in get_args(OrderKind) if kind != "given"]
CELLS = GRID[0] * GRID[1]


def _transformer(kind: str, order: OrderConfig, *, target_positions: bool = False) -> Transformer:
    torch.manual_seed(0)
    values = {"num_layers": 2, "num_heads": 2, "width": WIDTH, "target_positions": target_positions}
    config = GPTConfig.model_validate(values) if kind == "gpt" else LlamaConfig.model_validate(values)
    model = build_transformer(config, vocabulary_size=VOCABULARY, grid=GRID, prefix_length=3, order=order)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.token_embedding.weight, std=2.0)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(4, 4), (8, 8), (3, 5), (5, 2), (1, 7), (1, 1)])
def test_an_order_writes_every_cell_once_and_can_be_undone(kind: str, grid: tuple[int, int]) -> None:
    order = cells_in_order(OrderConfig.model_validate({"kind": kind}), grid)
    count = grid[0] * grid[1]
    assert order.sort().values.tolist() == list(range(count))
    values = torch.randn(2, count, 3)
    assert torch.equal(to_raster(to_sequence(values, order), order), values)
    assert torch.equal(order[inverse(order)], torch.arange(count))


def test_orders_by_hand() -> None:
    def order_of(kind: str, grid: tuple[int, int]) -> list[int]:
        return cells_in_order(OrderConfig.model_validate({"kind": kind}), grid).tolist()

    assert order_of("alternating", (2, 3)) == [0, 1, 2, 5, 4, 3]
    assert order_of("z_curve", (2, 4)) == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order_of("subsample", (4, 4)) == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]
    assert order_of("spiral_out", (3, 3)) == [4, 5, 8, 7, 6, 3, 0, 1, 2]
    assert order_of("spiral_in", (3, 3)) == order_of("spiral_out", (3, 3))[::-1]
    seeds = [cells_in_order(OrderConfig(kind="random", seed=seed), (4, 4)).tolist() for seed in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2]


def test_subsampling_is_the_published_recursion() -> None:
    index, rows, columns = torch.arange(64).view(1, 8, 8), 8, 8
    while min(rows, columns) > 1:
        rows, columns = rows // 2, columns // 2
        index = index.view(-1, rows, 2, columns, 2).permute(0, 2, 4, 1, 3).reshape(-1, rows, columns)
    assert torch.equal(cells_in_order(OrderConfig(kind="subsample"), (8, 8)), index.flatten())


def test_a_given_order_is_checked() -> None:
    for values in ({"kind": "given"}, {"kind": "given", "cells": [0, 0, 1]}, {"cells": [0, 1]}):
        with pytest.raises(ValueError, match="cells"):
            OrderConfig.model_validate(values)
    with pytest.raises(ConfigError, match="lists 3 cells, but the grid has 3x4"):
        _transformer("gpt", OrderConfig(kind="given", cells=(2, 0, 1)))


def test_a_smaller_grid_is_written_as_its_cells_come() -> None:
    order = cells_in_order(OrderConfig(kind="spiral_in"), (4, 4))
    part = restricted(order, (4, 4), (2, 3))
    ranks = inverse(order).view(4, 4)[:2, :3].flatten()
    assert torch.equal(part, ranks.argsort())


@pytest.mark.parametrize("target_positions", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("order", ["z_curve", "spiral_out", "random", "raster"])
def test_cached_sampling_keeps_to_the_order(order: str, kind: str, target_positions: bool) -> None:
    config = OrderConfig.model_validate({"kind": order})
    model = _transformer(kind, config, target_positions=target_positions)
    prefix, uniforms = random_prefix(2), picture_uniforms(0, 0, 2, CELLS)
    cached = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings())
    whole = sample_codes(model, prefix, None, GRID, uniforms, SamplingSettings(), cached=False)
    assert torch.equal(cached, whole)
    # What comes first in the order does not know what comes later.
    sequence = to_sequence(cached.flatten(1), cells_in_order(config, GRID))
    changed = sequence.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(sequence, prefix), model(changed, prefix)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_orders_of_one_sample_each(kind: str) -> None:
    """A batch with an order a sample predicts what each sample does with its own."""
    model = _transformer(kind, OrderConfig(), target_positions=True)
    prefix = random_prefix(3)
    codes = torch.randint(VOCABULARY, (3, CELLS), generator=torch.Generator().manual_seed(0))
    orders = torch.stack(
        [torch.randperm(CELLS, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    )
    with torch.no_grad():
        together = model(to_sequence(codes, orders), prefix, GRID, orders)
        for row in range(3):
            alone = model(codes[:, orders[row]], prefix, GRID, orders[row])
            torch.testing.assert_close(together[row], alone[row], atol=1e-5, rtol=1e-5)
        own = model(codes, prefix)
        assert torch.equal(model(codes, prefix, GRID, torch.arange(CELLS)), own)


def test_the_target_of_a_random_order_is_told() -> None:
    """With target positions the same inputs predict another cell otherwise; without, they cannot."""
    codes = torch.zeros(1, 2, dtype=torch.int64)
    first, second = torch.arange(CELLS), torch.arange(CELLS)
    second[1:3] = second[1:3].flip(0)
    for told in (False, True):
        model = _transformer("llama", OrderConfig(), target_positions=told)
        prefix = random_prefix(1)
        prefix = type(prefix)(prefix.embeddings, prefix.mask)
        with torch.no_grad():
            one, other = (model(codes, prefix, GRID, order)[:, 1] for order in (first, second))
        assert torch.equal(one, other) != told


def test_a_window_needs_raster_order() -> None:
    model, prefix = _transformer("llama", OrderConfig(kind="spiral_in")), random_prefix(1, grid=(6, 6))
    with pytest.raises(UserError, match=r"'spiral_in'.*needs raster order"):
        sample_sliding(
            model, lambda top, left: prefix, None, (6, 6), picture_uniforms(0, 0, 1, 36), SamplingSettings()
        )
