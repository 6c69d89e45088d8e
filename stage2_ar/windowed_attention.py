"""Causal attention within a window of rows and columns, for pictures of any size.

A cell (i, j) sees the cells before it, in raster order, of rows i - R to i and columns j - C to j + C
(neighbourhood attention, Hassani et al. 2023, made causal), and all of the prefix. Rotary positions tell
only how far away a cell is, so what was computed for it stays true wherever the picture goes on.

Places. Each row of a picture has W + 1 inputs: its start, which is the prefix's last embedding again, and
its W codes. Input (i, k) predicts cell (i, k), for k < W, and carries code (i, k - 1), for k > 0; it lies
at (i, k), and is in a cell's window where the code that it carries is. So a cell sees all codes around it,
up to C columns to the right in the rows above. Were the inputs those of plain raster order, the first of a
row would carry the code at the far end of the row above: nearly noise, another distance at every width, and
no row could begin before the one above had ended. The start of row 0 is the last prefix position itself.

The prefix speaks of the picture as a whole: its keys meet queries that are not turned, so that a class or a
text says the same to every cell, however far away.

Axes: B sequences, H heads, C channels of a head, P prefix positions, S inputs of cells in raster order
((W + 1) a row), A active inputs of a step, M rows of the ring, n inputs in a window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from stage2_ar.attention import AttentionProjections, attention_mask
from taming.layers.position import Rotation, grid_cells, rotary_2d, rotate

Grid = tuple[int, int]
Window = tuple[int, int]
"""(R, C): rows above, and columns to each side, that a cell sees."""

Pair = tuple[Tensor, Tensor]

LARGEST_MATRIX = 1024
"""Up to so many inputs attention holds its whole matrix; more are taken in tiles, linear in the grid."""
_TILE = 16


class WindowAttend(Protocol):
    """How the inputs of one call attend, the same for every layer."""

    def over(self, query: Tensor, key: Tensor, value: Tensor, layer: int, dropout: float) -> Tensor:
        """What (B, H, T, C) queries make of these keys and values: (B, H, T, C)."""
        ...


class WindowedAttention(AttentionProjections):
    """The projections of `CausalAttention`, by the same names, around a window's attention."""

    def forward(self, x: Tensor, attend: WindowAttend, layer: int, *, only_last: bool = False) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D) where only the last position's answer is wanted."""
        query, key, value = self.project(x)
        out = attend.over(query, key, value, layer, self.dropout if self.training else 0.0)
        projected: Tensor = self.proj(rearrange(out[:, :, -1:] if only_last else out, "b h t c -> b t (h c)"))
        return projected


def in_window(query: Tensor, key: Tensor, window: Window) -> Tensor:
    """Whether inputs at `query` (..., 2) see those at `key` (..., 2), both (row, k): (...) bool.

    The start of row 0 is seen as part of the prefix and not here.
    """
    above = query[..., 0] - key[..., 0]
    across = key[..., 1] - 1 - query[..., 1]  # from the predicted cell to the code that the input carries
    before = (above > 0) | ((above == 0) & (key[..., 1] <= query[..., 1]))
    inside = (above <= window[0]) & (across.abs() <= window[1])
    return before & inside & ((key[..., 0] > 0) | (key[..., 1] > 0))


@dataclass(frozen=True, eq=False)
class Tile:
    """A rectangle of queries, and the rectangle of keys that holds all which they see."""

    query_rows: slice
    query_columns: slice
    key_rows: slice
    key_columns: slice


def tiles_of(num_rows: int, row_length: int, window: Window) -> list[list[Tile]]:
    """Bands of tiles that cover num_rows x row_length inputs: one tile where the matrix is small."""
    whole = num_rows * row_length <= LARGEST_MATRIX
    row_parts = [slice(0, num_rows)] if whole else _parts(num_rows)
    column_parts = [slice(0, row_length)] if whole else _parts(row_length)
    rows_above, reach = window
    return [
        [
            Tile(
                rows,
                columns,
                slice(max(0, rows.start - rows_above), rows.stop),
                slice(max(0, columns.start + 1 - reach), min(row_length, columns.stop + 1 + reach)),
            )
            for columns in column_parts
        ]
        for rows in row_parts
    ]


class WindowGrid:
    """All inputs of a picture at once: a prefix (P), less its last, and S inputs of whole rows."""

    def __init__(
        self, grid: Grid, window: Window, prefix_length: int, prefix_mask: Tensor | None,
        rotary_base: float, device: torch.device,
    ) -> None:  # fmt: skip
        self.num_rows, self.row_length = grid[0], grid[1] + 1
        self.window, self.prefix_length, self.prefix_mask = window, prefix_length, prefix_mask
        self.rotary_base = rotary_base
        self.places = grid_cells(self.num_rows, self.row_length, device=device)  # (S, 2)
        self.bands = tiles_of(self.num_rows, self.row_length, window)
        self._rotation: Rotation | None = None
        self._biases: dict[Tile, Tensor] = {}

    def over(self, query: Tensor, key: Tensor, value: Tensor, layer: int, dropout: float) -> Tensor:
        """(B, H, P - 1 + S, C) each -> the same."""
        num_prefix = self.prefix_length
        prefix = key[:, :, :num_prefix], value[:, :, :num_prefix]
        before = None
        if num_prefix > 1:
            first = slice(0, num_prefix - 1)
            mask = None if self.prefix_mask is None else self.prefix_mask[:, first]
            before = _over_prefix(query[:, :, first], key[:, :, first], value[:, :, first], mask, dropout)
        plain, key, value = (part[:, :, num_prefix - 1 :] for part in (query, key, value))
        rotation = self._rotation_for(query)
        turned, key = rotate(plain, rotation), rotate(key, rotation)
        if len(self.bands) == 1 and len(self.bands[0]) == 1:
            tile = self.bands[0][0]
            biases = self._prefix_bias(tile, query.dtype), self._bias(tile, query.dtype)
            out = _attend((plain, turned), prefix, (key, value), biases, dropout)
        else:
            out = self._by_tiles((plain, turned), prefix, (key, value), dropout)
        return out if before is None else torch.cat((before, out), dim=2)

    def _by_tiles(self, queries: Pair, prefix: Pair, cells: Pair, dropout: float) -> Tensor:
        plain, turned, key, value = (
            rearrange(part, "b h (row k) c -> b h row k c", k=self.row_length) for part in (*queries, *cells)
        )
        bands = []
        for band in self.bands:
            done = []
            for tile in band:
                rows, columns = tile.query_rows, tile.query_columns
                of_tile = slice(None), slice(None), rows, columns
                seen = slice(None), slice(None), tile.key_rows, tile.key_columns
                out = _attend(
                    (_flat(plain[of_tile]), _flat(turned[of_tile])),
                    prefix,
                    (_flat(key[seen]), _flat(value[seen])),
                    (self._prefix_bias(tile, plain.dtype), self._bias(tile, plain.dtype)),
                    dropout,
                )
                done.append(rearrange(out, "b h (row k) c -> b h row k c", row=rows.stop - rows.start))
            bands.append(torch.cat(done, dim=3))
        return _flat(torch.cat(bands, dim=2))

    def _rotation_for(self, query: Tensor) -> Rotation:
        if self._rotation is None or self._rotation[0].dtype != query.dtype:
            cos, sin = rotary_2d(self.places, query.shape[-1], self.rotary_base)
            self._rotation = cos.to(query.dtype), sin.to(query.dtype)
        return self._rotation

    def _bias(self, tile: Tile, dtype: torch.dtype) -> Tensor:
        """0 where a query of the tile sees a key, else -inf: (queries, keys)."""
        bias = self._biases.get(tile)
        if bias is None or bias.dtype != dtype:
            places = rearrange(self.places, "(row k) two -> row k two", k=self.row_length)
            queries = rearrange(places[tile.query_rows, tile.query_columns], "row k two -> (row k) 1 two")
            keys = rearrange(places[tile.key_rows, tile.key_columns], "row k two -> 1 (row k) two")
            bias = as_bias(in_window(queries, keys, self.window), dtype)
            self._biases[tile] = bias
        return bias

    def _prefix_bias(self, tile: Tile, dtype: torch.dtype) -> Tensor | None:
        """0 where the prefix is seen, else -inf: (B, 1, 1 or queries, P), or None where all of it is."""
        if self.prefix_mask is None:
            return None
        visible = self.prefix_mask[:, None, None]
        rows, columns = tile.query_rows, tile.query_columns
        if rows.start == columns.start == 0:
            # The very first query is the last prefix position: it sees itself, even where it is masked.
            visible = visible.repeat(1, 1, (rows.stop - rows.start) * (columns.stop - columns.start), 1)
            visible[:, :, 0, -1] = True
        return as_bias(visible, dtype)


@dataclass
class WindowCache:
    """What sampling keeps of one batch: the prefix, and the last rows of a picture in a ring.

    Input (i, k) lies in the ring at row i mod M, column k; its size does not depend on the height.
    """

    num_rows: int
    row_length: int
    prefix_mask: Tensor | None
    prefix_keys: list[Tensor] = field(default_factory=list)
    """(B, H, P, C) a layer, not turned."""
    prefix_values: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    """(B, H, M * row_length, C) a layer."""
    values: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class WindowPrefill:
    """The prefix alone; its keys and values begin a cache."""

    cache: WindowCache

    def over(self, query: Tensor, key: Tensor, value: Tensor, layer: int, dropout: float) -> Tensor:
        """(B, H, P, C) each -> the same."""
        cache = self.cache
        cache.prefix_keys.append(key.contiguous())
        cache.prefix_values.append(value.contiguous())
        batch, heads, _, channels = key.shape
        shape = (batch, heads, cache.num_rows * cache.row_length, channels)
        # Zeros: what was never written is hidden by a bias, which cannot hide a NaN.
        cache.keys.append(key.new_zeros(shape))
        cache.values.append(value.new_zeros(shape))
        return _over_prefix(query, key, value, cache.prefix_mask, dropout)


class WindowStep:
    """Some inputs (A), each of another row, that are taken in together.

    What they see must be in the cache, or among themselves.
    """

    def __init__(
        self, cache: WindowCache, places: Tensor, window: Window, head_dim: int, rotary_base: float,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.cache = cache
        cos, sin = rotary_2d(places, head_dim, rotary_base)
        self.rotation = cos.to(dtype), sin.to(dtype)
        rows, columns = places[:, 0], places[:, 1]
        self.write = rows % cache.num_rows * cache.row_length + columns  # (A,)
        rows_above, reach = window
        device = places.device
        above = rows[:, None] - torch.arange(rows_above, -1, -1, device=device)  # (A, R + 1)
        around = columns[:, None] + torch.arange(1 - reach, reach + 2, device=device)  # (A, 2 C + 1)
        seen = torch.stack(
            (
                repeat(above, "a row -> a (row k)", k=around.shape[1]),
                repeat(around, "a k -> a (row k)", row=above.shape[1]),
            ),
            dim=-1,
        )  # (A, n, 2)
        exists = (seen[..., 0] >= 0) & (seen[..., 1] >= 0) & (seen[..., 1] < cache.row_length)
        visible = exists & in_window(places[:, None], seen, window)
        slots = seen[..., 0] % cache.num_rows * cache.row_length + seen[..., 1].clamp(0, cache.row_length - 1)
        self.read = slots.flatten()  # (A n,)
        self.bias = as_bias(visible, dtype)[:, None]  # (A, 1, n)
        self.prefix_bias = None
        if cache.prefix_mask is not None:
            self.prefix_bias = as_bias(cache.prefix_mask, dtype)[:, None, None, None]  # (B, 1, 1, 1, P)

    def over(self, query: Tensor, key: Tensor, value: Tensor, layer: int, dropout: float) -> Tensor:
        """(B, H, A, C) each -> the same."""
        cache = self.cache
        keys, values = cache.keys[layer], cache.values[layer]
        turned = rotate(query, self.rotation)
        keys.index_copy_(2, self.write, rotate(key, self.rotation))
        values.index_copy_(2, self.write, value)
        # A copy of the window's few keys: a strided view of them would be copied by the product as well.
        seen_keys, seen_values = (
            rearrange(part.index_select(2, self.read), "b h (a n) c -> b h a n c", a=query.shape[2])
            for part in (keys, values)
        )
        prefix_keys, prefix_values = (
            part[layer][:, :, None] for part in (cache.prefix_keys, cache.prefix_values)
        )
        scale = query.shape[-1] ** -0.5
        of_prefix = (query * scale)[..., None, :] @ prefix_keys.transpose(-1, -2)  # (B, H, A, 1, P)
        if self.prefix_bias is not None:
            of_prefix = of_prefix + self.prefix_bias
        of_window = (turned * scale)[..., None, :] @ seen_keys.transpose(-1, -2) + self.bias
        weights = torch.cat((of_prefix, of_window), dim=-1).softmax(dim=-1)
        of_prefix, of_window = weights.split((of_prefix.shape[-1], of_window.shape[-1]), dim=-1)
        return (of_prefix @ prefix_values + of_window @ seen_values).squeeze(-2)


def as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `visible` (...) bool is True, else -inf."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, float("-inf"))


def _attend(
    queries: Pair, prefix: Pair, cells: Pair, biases: tuple[Tensor | None, Tensor], dropout: float
) -> Tensor:
    """One softmax over the prefix, by queries that are not turned, and over cells, by those that are.

    Pairs are (plain, turned) queries and (keys, values), each (B, H, ..., C); biases are of the prefix and
    of the cells.
    """
    (plain, turned), (prefix_key, prefix_value), (key, value), (prefix_bias, bias) = (
        queries, prefix, cells, biases,
    )  # fmt: skip
    batch, scale = plain.shape[0], plain.shape[-1] ** -0.5
    of_prefix = (plain * scale) @ prefix_key.transpose(-1, -2)
    if prefix_bias is not None:
        of_prefix = of_prefix + prefix_bias
    turned, key = (rearrange(part, "b h t c -> (b h) t c") for part in (turned, key))
    of_cells = torch.baddbmm(bias[None], turned, key.transpose(1, 2), alpha=scale)
    of_cells = rearrange(of_cells, "(b h) t s -> b h t s", b=batch)
    weights = torch.cat((of_prefix, of_cells), dim=-1).softmax(dim=-1).to(value.dtype)
    weights = functional.dropout(weights, dropout) if dropout else weights
    return weights @ torch.cat((prefix_value, value), dim=2)


def _over_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix_mask: Tensor | None, dropout: float
) -> Tensor:
    length = query.shape[2]
    mask = attention_mask(prefix_mask, 0, 0, length, query.device)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and length > 1
    )


def _flat(part: Tensor) -> Tensor:
    return rearrange(part, "b h row k c -> b h (row k) c")


def _parts(length: int) -> list[slice]:
    """Slices of about _TILE that cover `length`, of nearly one size."""
    count = -(-length // _TILE)
    edges = [length * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]
