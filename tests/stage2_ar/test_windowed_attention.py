"""Attention within a window: against a loop over cells, by tiles as by one matrix, in bf16."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from einops import rearrange
from pydantic import ValidationError
from torch import Tensor

from stage2_ar import windowed_attention
from stage2_ar.conditions.config import NoConditionConfig, SegmentationConditionConfig
from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.model import ARModel
from stage2_ar.order import OrderConfig
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import LlamaConfig
from stage2_ar.windowed_attention import WindowGrid
from taming.config import load_config
from taming.errors import UserError
from taming.layers.position import rotary_2d, rotate
from taming.types import Prefix
from tests.stage2_ar.small import VOCABULARY, WIDTH

BASE = 100.0


def windowed_transformer(
    window: tuple[int, int], layers: int = 2, grid: tuple[int, int] = (3, 4)
) -> Transformer:
    """In eval mode; predictions differ from cell to cell."""
    config = LlamaConfig(
        num_layers=layers, num_heads=2, width=WIDTH, attention_window=window, rotary_base=BASE
    )
    torch.manual_seed(0)
    model = build_transformer(config, vocabulary_size=VOCABULARY, grid=grid, prefix_length=3).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.token_embedding.weight, std=2.0)
    return model


def windowed_prefix(batch: int, grid: tuple[int, int], *, length: int = 3, seed: int = 0) -> Prefix:
    """With aligned cells; the last position of the last sample is hidden, and of the first none."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    if batch > 1:
        mask[-1, -1] = False
    return Prefix(
        torch.randn(batch, length, WIDTH, generator=generator),
        mask,
        torch.randn(batch, *grid, WIDTH, generator=generator),
    )


def _by_loops(
    query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int], window: tuple[int, int],
    hidden: set[int], prefix_length: int,
) -> Tensor:  # fmt: skip
    """One head, one sequence, one query at a time: (T, C) each.

    Written in terms of cells: the input that predicts cell (i, j) sees the codes of cells (i', j') that the
    window holds, wherever among the inputs they are.
    """
    width, scale = grid[1], key.shape[1] ** -0.5
    out = torch.zeros_like(query)
    row_starts = [row * (width + 1) + prefix_length - 1 for row in range(grid[0])]

    def turned(vector: Tensor, row: int, column: int) -> Tensor:
        return rotate(vector[None], rotary_2d(torch.tensor([[row, column]]), len(vector), BASE))[0]

    for place in range(len(query)):
        seen: list[tuple[Tensor, Tensor]] = []  # scores and values
        for other in range(min(place + 1, prefix_length)):
            if other == place or other not in hidden:
                seen.append((query[place] @ key[other] * scale, value[other]))
        if place >= prefix_length:
            row, column = divmod(place - prefix_length + 1, width + 1)
            asked = turned(query[place], row, column)
            for i in range(max(0, row - window[0]), row + 1):
                for j in range(-1, width):  # the code at (i, j); -1 is the start of the row
                    other = row_starts[i] + j + 1
                    near = abs(j - column) <= window[1] and (i < row or j < column)
                    if near and other >= prefix_length:
                        seen.append((asked @ turned(key[other], i, j + 1) * scale, value[other]))
        weights = torch.stack([score for score, _ in seen]).softmax(0)
        out[place] = sum(weight * what for weight, (_, what) in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (9, 9)])
@pytest.mark.parametrize("prefix_length", [1, 3])
@pytest.mark.parametrize("tiled", [False, True])
def test_agrees_with_a_loop_over_cells(
    window: tuple[int, int], prefix_length: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiled:
        monkeypatch.setattr(windowed_attention, "LARGEST_MATRIX", 1)
        monkeypatch.setattr(windowed_attention, "_TILE", 2)
    grid = (4, 5)
    length = prefix_length - 1 + grid[0] * (grid[1] + 1)
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, prefix_length, dtype=torch.bool)
    mask[1, -1] = False
    attend = WindowGrid(grid, window, prefix_length, mask, BASE, torch.device("cpu"))
    out = attend.over(query, key, value, 0, 0.0)
    expected = torch.stack(
        [
            torch.stack(
                [
                    _by_loops(
                        query[sample, head],
                        key[sample, head],
                        value[sample, head],
                        grid,
                        window,
                        {prefix_length - 1} if sample else set(),
                        prefix_length,
                    )
                    for head in range(2)
                ]
            )
            for sample in range(2)
        ]
    )
    assert torch.allclose(out, expected, atol=1e-5)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, key, value), upstream)
    theirs = torch.autograd.grad(expected, (query, key, value), upstream)
    for mine, right in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, right, atol=1e-5)


def test_tiles_are_what_the_matrix_is_and_grow_with_the_grid_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prefix = windowed_transformer((2, 3)), windowed_prefix(2, (9, 11))
    codes = torch.randint(VOCABULARY, (2, 99), generator=torch.Generator().manual_seed(0))
    whole = model(codes, prefix, (9, 11))
    monkeypatch.setattr(windowed_attention, "LARGEST_MATRIX", 1)
    monkeypatch.setattr(windowed_attention, "_TILE", 4)
    assert torch.allclose(model(codes, prefix, (9, 11)), whole, atol=1e-5)
    sizes = [
        sum(
            prod(
                part.stop - part.start
                for part in (tile.query_rows, tile.query_columns, tile.key_rows, tile.key_columns)
            )
            for band in windowed_attention.tiles_of(*size, (2, 3))
            for tile in band
        )
        for size in ((40, 41), (80, 81))
    ]  # fmt: skip
    assert sizes[1] < 4.4 * sizes[0]


def test_only_the_window_and_the_prefix_are_seen() -> None:
    """With one layer a cell's logits depend on the codes around it, and on the prefix from everywhere."""
    grid, window = (6, 9), (2, 2)
    model, prefix = windowed_transformer(window, layers=1), replace(windowed_prefix(1, grid), cells=None)
    codes = torch.zeros(1, 54, dtype=torch.int64)
    base = model(codes, prefix, grid)
    for cell in (0, 4, 13, 31, 53):
        changed = codes.clone()
        changed[0, cell] = 5
        moved = (model(changed, prefix, grid) - base).abs().amax(-1)[0] > 1e-4
        row, column = divmod(cell, 9)
        for other in range(54):
            i, j = divmod(other, 9)
            seen = other > cell and i - row <= window[0] and abs(j - column) <= window[1]
            assert bool(moved[other]) == seen, (cell, other)
    spoken = replace(prefix, embeddings=prefix.embeddings + torch.tensor([1.0, 0, 0])[None, :, None])
    assert ((model(codes, spoken, grid) - base).abs().amax(-1) > 1e-4).all()


def test_a_cell_is_told_the_same_wherever_it_lies() -> None:
    """Far from the borders logits follow a shift of the picture: positions are relative."""
    grid, window = (7, 24), (1, 2)
    model = windowed_transformer(window, layers=2)
    prefix = replace(windowed_prefix(1, grid), cells=None)
    codes = torch.randint(VOCABULARY, (1, *grid), generator=torch.Generator().manual_seed(3))
    shifted = codes.roll((1, 3), dims=(1, 2))
    logits, moved = (
        rearrange(model(part.flatten(1), prefix, grid), "b (h w) v -> b h w v", h=grid[0])
        for part in (codes, shifted)
    )
    assert torch.allclose(logits[:, 3:6, 5:10], moved[:, 4:7, 8:13], atol=1e-4)


def test_fewer_codes_than_cells_and_none_after_are_read() -> None:
    grid = (4, 5)
    model, prefix = windowed_transformer((2, 2)), windowed_prefix(2, grid)
    codes = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = model(codes, prefix, grid)
    for count in (1, 5, 13):
        assert torch.allclose(model(codes[:, :count], prefix, grid), whole[:, :count], atol=1e-5)


def test_under_autocast_it_is_near_to_fp32_and_learns() -> None:
    grid = (5, 6)
    model, prefix = windowed_transformer((2, 3)).train(), windowed_prefix(2, grid)
    for parameter in model.parameters():
        parameter.data *= 0.3
    codes = torch.randint(VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    exact = model(codes, prefix, grid)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(codes, prefix, grid)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.05 * float(exact.detach().abs().max()))
    half.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_and_recomputing_go_together() -> None:
    config = LlamaConfig(
        num_layers=2, num_heads=2, width=WIDTH, attention_window=(2, 2), attention_dropout=0.5
    )
    model = build_transformer(config, vocabulary_size=VOCABULARY, grid=(3, 4), prefix_length=3).train()
    prefix, codes = windowed_prefix(2, (3, 4)), torch.zeros(2, 12, dtype=torch.int64)
    grads = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(codes, prefix).square().mean().backward()
        gradient = model.get_parameter("blocks.0.attention.qkv.weight").grad
        assert gradient is not None
        grads.append(gradient.clone())
    assert torch.allclose(grads[0], grads[1], atol=1e-7)
    assert not torch.equal(model(codes, prefix), model(codes, prefix))


def test_the_same_names_as_full_attention() -> None:
    config = LlamaConfig(num_layers=1, num_heads=2, width=WIDTH)
    names = [
        set(build_transformer(part, vocabulary_size=VOCABULARY, grid=(3, 4), prefix_length=1).state_dict())
        for part in (config, config.model_copy(update={"attention_window": (2, 2)}))
    ]
    assert names[0] == names[1]


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match="attention_window is for pictures of any size"):
        LlamaConfig(attention_window=(2, 2), target_positions=True)
    with pytest.raises(ValidationError):
        LlamaConfig(attention_window=(0, 2))
    base = ARModelConfig(
        transformer=LlamaConfig(num_layers=1, num_heads=2, width=WIDTH, attention_window=(2, 2)),
        condition=NoConditionConfig(), vocabulary_size=VOCABULARY, grid=(3, 4), downsample_factor=4,
        tokenizer_hash="0" * 64,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"order\.kind is 'z_curve'; use raster"):
        ARModel(base.model_copy(update={"order": OrderConfig(kind="z_curve")}))
    aligned = SegmentationConditionConfig(num_labels=3, hidden_width=8)
    ARModel(base.model_copy(update={"condition": aligned}))
    with pytest.raises(
        UserError, match="'segmentation' grows with the picture; set its placement to aligned"
    ):
        ARModel(base.model_copy(update={"condition": aligned.model_copy(update={"placement": "prefix"})}))
    gridded = Prefix(torch.zeros(1, 12, WIDTH), torch.ones(1, 12, dtype=torch.bool), segments=((3, 4),))
    with pytest.raises(UserError, match=r"use condition\.placement=aligned"):
        windowed_transformer((2, 2))(torch.zeros(1, 12, dtype=torch.int64), gridded)


def test_one_row_after_one_position_is_full_attention() -> None:
    """Where there is neither a row above nor a place of the prefix, a window that holds all changes nothing
    but the places of codes, which are relative: the weights of full attention give the same logits."""
    grid = (1, 9)
    config = LlamaConfig(num_layers=2, num_heads=2, width=WIDTH, rotary_base=BASE)
    torch.manual_seed(0)
    full = build_transformer(config, vocabulary_size=VOCABULARY, grid=grid, prefix_length=1).eval()
    windowed = windowed_transformer((1, 9), grid=grid)
    windowed.load_state_dict(full.state_dict())
    prefix = Prefix(torch.zeros(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.bool))
    codes = torch.randint(VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    # The prefix's key is zero: how a query is turned towards it cannot matter.
    assert torch.allclose(full(codes, prefix), windowed(codes, prefix), atol=1e-5)


def test_the_shipped_config_writes_any_size() -> None:
    overrides = ["data.root=/nowhere", "tokenizer=/nowhere"]
    config = load_config(ARTrainConfig, "segmentation_any_size", overrides, group="stage2")
    small = config.transformer.model_copy(update={"num_layers": 1, "num_heads": 2, "width": WIDTH})
    model = ARModel(
        ARModelConfig(
            transformer=small, condition=config.condition, vocabulary_size=VOCABULARY, grid=(4, 4),
            downsample_factor=4, tokenizer_hash="0" * 64,
        )
    ).eval()  # fmt: skip
    assert model.transformer.window == (8, 7)
    codes = torch.zeros(1, 6, 11, dtype=torch.int64)
    assert model(codes, model.condition.example(1, (6, 11))).shape == (1, 66, VOCABULARY)
