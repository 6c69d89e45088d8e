"""How probable pictures are under the settings that they were drawn with: what best-of-n chooses by.

Guidance and temperature count as they did when drawing; top-k and top-p do not, under which all that was
drawn is about equally good and what was given may be impossible.

Axes: B pictures, N cells, h w cells of a window, V codes.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional

from stage2_ar.conditions.base import WindowPrefix
from stage2_ar.order import Grid, inverse, to_raster, to_sequence
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import SamplingSettings, stack_prefixes
from stage2_ar.sampling.sliding_window import place_windows, window_size
from stage2_ar.transformer import Transformer
from taming.types import Prefix


@torch.no_grad()
def drawn_log_likelihood(
    transformer: Transformer,
    prefix: Prefix,
    null_prefix: Prefix | None,
    codes: Tensor,
    settings: SamplingSettings,
    order: Tensor | None = None,
) -> Tensor:
    """(B,) nats of all cells of codes (B, h, w), written in `order` (N,), by default the model's own.

    `null_prefix` is not None where `settings` guide.
    """
    grid = (codes.shape[1], codes.shape[2])
    order = transformer.sequence_cells(grid, codes.device) if order is None else order.to(codes.device)
    logits = _logits(transformer, prefix, null_prefix, to_sequence(codes.flatten(1), order), grid, order)
    return _each_cell(to_raster(logits, order), codes.flatten(1), inverse(order), settings).sum(-1)


@torch.no_grad()
def drawn_log_likelihood_sliding(
    transformer: Transformer,
    windows: WindowPrefix,
    null_windows: WindowPrefix | None,
    codes: Tensor,
    settings: SamplingSettings,
) -> Tensor:
    """(B,) nats of codes (B, H, W) of a picture larger than the transformer's grid.

    Windows move by half of their size at once, not cell by cell: a cell still sees at least about half of a
    window before it, and that is the same for all pictures that are compared.
    """
    _, height, width = codes.shape
    grid = (height, width)
    size = window_size(transformer.grid, grid)
    placed: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    half = max(size[0] // 2, 1)
    for place in place_windows(grid, size, stride=max(size[1] // 2, 1)):
        furthest = height - size[0]
        top = min(max(place.row - half, 0) // half * half, furthest)
        placed[top, place.left].append((place.row, place.column))
    total = torch.zeros(len(codes), device=codes.device)
    order = torch.arange(size[0] * size[1], device=codes.device)
    for (top, left), cells in placed.items():
        inside = codes[:, top : top + size[0], left : left + size[1]].flatten(1)
        prefix = windows(top, left)
        null = None if null_windows is None else null_windows(top, left)
        rows, columns = torch.tensor(cells, device=codes.device).unbind(1)
        index = (rows - top) * size[1] + columns - left
        logits = _logits(transformer, prefix, null, inside, size, order)
        total += _each_cell(logits[:, index], inside[:, index], rows * width + columns, settings, grid).sum(
            -1
        )
    return total


def _logits(
    transformer: Transformer,
    prefix: Prefix,
    null_prefix: Prefix | None,
    sequence: Tensor,
    grid: Grid,
    order: Tensor,
) -> Tensor:
    """In the order of writing, doubled where there is a null prefix."""
    if null_prefix is not None:
        prefix, sequence = stack_prefixes(prefix, null_prefix), torch.cat((sequence, sequence))
    logits: Tensor = transformer(sequence, prefix, grid, order)
    return logits


def _each_cell(
    logits: Tensor, codes: Tensor, ranks: Tensor, settings: SamplingSettings, grid: Grid | None = None
) -> Tensor:
    """(B, n) nats of codes (B, n) under logits (B or 2 B, n, V); ranks (n,) say when a cell was written."""
    if len(logits) > len(codes):
        cells = len(ranks) if grid is None else grid[0] * grid[1]
        scales = torch.tensor([settings.scale_of(rank, cells) for rank in ranks.tolist()])
        logits = guided(logits, scales.to(logits.device)[:, None])
    log_probabilities = functional.log_softmax(logits.float() / settings.temperature, dim=-1)
    return log_probabilities.gather(-1, codes[..., None]).squeeze(-1)
