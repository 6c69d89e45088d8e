"""Grids larger than the transformer was trained on, by a window that moves along with the cell.

The window is placed as published (Esser et al. 2021, appendix): the cell sits in its middle, or nearer to an
edge where the picture ends. What is computed is less: nothing after the cell, and keys and values are kept
while the window rests. Every schedule draws the same picture, for each cell has its own random number.

Axes: B pictures, R = B or 2 B rows of the transformer's batch (guidance doubles it), H W cells of the
picture, h w cells of the window, V codes.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from stage2_ar.attention import KVCache
from stage2_ar.conditions.base import WindowPrefix
from stage2_ar.order import Grid
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import (
    Known,
    Progress,
    SamplingSettings,
    draw,
    needs_guidance,
    stack_prefixes,
)
from stage2_ar.transformer import Transformer
from taming.errors import UserError
from taming.types import Prefix

Schedule = Literal["serial", "wavefront"]


@dataclass(frozen=True)
class Placement:
    """One cell, and the window in which it is drawn."""

    row: int
    column: int
    top: int
    left: int

    @property
    def origin(self) -> tuple[int, int]:
        return self.top, self.left


def window_size(transformer_grid: Grid, grid: Grid) -> Grid:
    """The window: the transformer's grid, or less along an axis on which the picture is smaller."""
    return min(transformer_grid[0], grid[0]), min(transformer_grid[1], grid[1])


def place_windows(grid: Grid, window: Grid, stride: int = 1) -> list[Placement]:
    """The window of each cell, in raster order.

    The origin is the cell less half of the window, kept inside of the picture. With a stride of s > 1 its
    column is rounded to a multiple of s, so that the window rests for s cells; s = 1 is as published.
    """
    if not 1 <= stride <= window[1]:
        raise UserError(f"window stride {stride} is not between 1 and the window's width, {window[1]} cells")
    placements = []
    for row in range(grid[0]):
        top = _origin(row, grid[0], window[0])
        for column in range(grid[1]):
            left, furthest = _origin(column, grid[1], window[1]), grid[1] - window[1]
            if left < furthest:
                left = min((left + stride // 2) // stride * stride, furthest)
            placements.append(Placement(row, column, top, left))
    return placements


def wavefront(
    placements: list[Placement], grid: Grid, window: Grid, given: set[tuple[int, int]]
) -> list[list[Placement]]:
    """Group cells into steps: a cell comes one step after the last of those that its window shows it.

    These are its left neighbour and, in the row above, the window's rightmost cell; all else was done
    before those. Cells of `given` need no step.
    """
    done = [[0] * grid[1] for _ in range(grid[0])]
    steps: dict[int, list[Placement]] = defaultdict(list)
    for place in placements:
        row, column = place.row, place.column
        left = done[row][column - 1] if column else 0
        above = done[row - 1][place.left + window[1] - 1] if row else 0
        if (row, column) in given:
            done[row][column] = max(left, above)
        else:
            done[row][column] = max(left, above) + 1
            steps[done[row][column]].append(place)
    return [steps[time] for time in sorted(steps)]


def sample_sliding(
    transformer: Transformer,
    window_prefix: WindowPrefix,
    null_window_prefix: WindowPrefix | None,
    grid: Grid,
    uniforms: Tensor,
    settings: SamplingSettings,
    *,
    known: Known | None = None,
    schedule: Schedule = "serial",
    stride: int = 1,
    progress: Progress | None = None,
) -> Tensor:
    """Draw grids of any size: (B, H, W) int64.

    `window_prefix` and its null give the prefix of each window (Condition.windows); uniforms (B, H * W)
    float64 from `picture_uniforms`. `serial` goes cell by cell, which needs the least
    arithmetic; `wavefront` draws cells that do not depend on each other in one batch, which pays where each
    call costs more than its arithmetic (a GPU). Both give the same codes.
    Raises UserError for settings or a stride out of range.
    """
    settings.validate(transformer.vocabulary_size)
    if transformer.order.kind != "raster":
        raise UserError(
            f"this model writes its cells in the order {transformer.order.kind!r}: a picture larger than the "
            f"{transformer.grid[0]}x{transformer.grid[1]} cells that it was trained on needs raster order"
        )
    window = window_size(transformer.grid, grid)
    placements = place_windows(grid, window, stride)
    prefix_at = window_prefix
    guide = needs_guidance(settings, null_window_prefix)
    if guide and null_window_prefix is not None:
        null_at = null_window_prefix

        def prefix_at(top: int, left: int) -> Prefix:
            return stack_prefixes(window_prefix(top, left), null_at(top, left))

    device = transformer.token_embedding.weight.device
    codes = torch.zeros(uniforms.shape[0], *grid, dtype=torch.int64, device=device)
    given: set[tuple[int, int]] = set()
    if known is not None:
        codes = torch.where(known[1].to(device), known[0].to(device), codes)
        given = {(int(row), int(column)) for row, column in known[1].all(dim=0).nonzero().tolist()}
    if schedule == "wavefront":
        steps = wavefront(placements, grid, window, given)
    else:
        steps = [[place] for place in placements if (place.row, place.column) not in given]
    painter = _Painter(transformer, prefix_at, window, guide, settings, codes, uniforms.to(device), known)
    painter.reuse_cache_across_rows = schedule == "serial"
    successors = dict(pairwise(placements))
    with torch.inference_mode():
        for number, step in enumerate(steps):
            painter.paint(step, successors)
            if progress is not None:
                progress(number + 1, len(steps))
    return painter.codes.clone()


class _Painter:
    """Draws the cells of one step after another into `codes`, and keeps the caches of resting windows."""

    def __init__(
        self,
        transformer: Transformer,
        prefix_at: WindowPrefix,
        window: Grid,
        guide: bool,
        settings: SamplingSettings,
        codes: Tensor,
        uniforms: Tensor,
        known: Known | None,
    ) -> None:
        self.transformer = transformer
        self.prefix_at = prefix_at
        self.window = window
        self.guide = guide
        self.settings = settings
        self.codes = codes
        self.uniforms = uniforms.view(codes.shape)
        self.is_known = None if known is None else known[1].to(codes.device)
        self.reuse_cache_across_rows = False
        self.caches: dict[int, tuple[tuple[int, int], KVCache]] = {}

    def paint(self, step: list[Placement], successors: dict[Placement, Placement]) -> None:
        """Draw cells that do not depend on each other."""
        moving: list[Placement] = []
        for place in step:
            successor = successors.get(place)
            key = self._key(place)
            rests = successor is not None and successor.origin == place.origin and self._key(successor) == key
            origin, cache = self.caches.get(key, (None, None))
            if cache is not None and origin == place.origin and cache.num_codes < self._index(place):
                logits = self.transformer.step(self._window_codes(place)[:, cache.num_codes :], cache)
                self._draw(place, logits)
            elif rests:
                self.caches.pop(key, None)
                prefix = self.prefix_at(*place.origin)
                logits, cache = self.transformer.prefill(prefix, self._window_codes(place), self.window)
                assert cache is not None
                self.caches[key] = (place.origin, cache)
                self._draw(place, logits)
            else:
                moving.append(place)
            if not rests and self.caches:
                self.caches.pop(key, None)
        if moving:
            self._paint_moving(moving)

    def _paint_moving(self, places: list[Placement]) -> None:
        """Windows that are seen once: one batch, padded on the right to the longest, without a cache."""
        prefix = _concatenate([self.prefix_at(*place.origin) for place in places])
        windows = [self._window_codes(place) for place in places]
        longest = max(codes.shape[1] for codes in windows)
        last = None
        if any(codes.shape[1] < longest for codes in windows):
            rows = windows[0].shape[0]
            lengths = torch.tensor([codes.shape[1] for codes in windows], device=self.codes.device)
            last = lengths.repeat_interleave(rows)
            windows = [torch.nn.functional.pad(codes, (0, longest - codes.shape[1])) for codes in windows]
        logits, _ = self.transformer.prefill(prefix, torch.cat(windows), self.window, last=last, keep=False)
        for place, part in zip(places, logits.chunk(len(places)), strict=True):
            self._draw(place, part)

    def _draw(self, place: Placement, logits: Tensor) -> None:
        row, column = place.row, place.column
        if self.guide:
            _, height, width = self.codes.shape
            logits = guided(logits, self.settings.scale_of(row * width + column, height * width))
        drawn = draw(logits, self.uniforms[:, row, column], self.settings)
        if self.is_known is not None:
            drawn = torch.where(self.is_known[:, row, column], self.codes[:, row, column], drawn)
        self.codes[:, row, column] = drawn

    def _window_codes(self, place: Placement) -> Tensor:
        """The window's codes before the cell, in raster order: (R, n)."""
        height, width = self.window
        inside = self.codes[:, place.top : place.top + height, place.left : place.left + width]
        before = inside.flatten(1)[:, : self._index(place)]
        return torch.cat((before, before)) if self.guide else before

    def _index(self, place: Placement) -> int:
        return (place.row - place.top) * self.window[1] + place.column - place.left

    def _key(self, place: Placement) -> int:
        # In a wavefront each row of the picture is at its own place, so each keeps its own cache.
        return 0 if self.reuse_cache_across_rows else place.row


def _origin(index: int, size: int, window: int) -> int:
    return max(0, min(index - window // 2, size - window))


def _concatenate(prefixes: list[Prefix]) -> Prefix:
    if len(prefixes) == 1:
        return prefixes[0]
    cells = [prefix.cells for prefix in prefixes if prefix.cells is not None]
    return replace(
        prefixes[0],
        embeddings=torch.cat([prefix.embeddings for prefix in prefixes]),
        mask=torch.cat([prefix.mask for prefix in prefixes]),
        cells=torch.cat(cells) if cells else None,
    )
