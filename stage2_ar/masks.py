"""Which cells and which pixels an edit may touch.

A pixel mask is True where a picture is painted anew; a known mask is True for cells that stay.

Axes: B pictures, C channels, H W pixels, h w cells, f downsample factor.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional

from stage2_ar.order import Grid
from taming.errors import UserError

Side = Literal["upper", "lower", "left", "right"]


def touched_cells(mask: Tensor, factor: int) -> Tensor:
    """Pixel mask (B, H, W) bool -> cells (B, h, w) bool that hold any pixel of it."""
    cells = reduce(mask.to(torch.uint8), "b (h p) (w q) -> b h w", "max", p=factor, q=factor)
    return cells.bool()


def pixels_of(cells: Tensor, factor: int) -> Tensor:
    """Cells (B, h, w) -> the pixels (B, h f, w f) that they are."""
    return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def half_known(keep: str, grid: Grid) -> Tensor:
    """Known cells (1, h, w) of the half of a picture that is kept; of an odd number the kept one is smaller.

    Raises UserError for another name, and where no cell would be kept.
    """
    if keep not in get_args(Side):
        raise UserError(f"keep {keep!r} is no side; choose {', '.join(get_args(Side))}")
    known = torch.zeros(1, *grid, dtype=torch.bool)
    rows, columns = grid[0] // 2, grid[1] // 2
    match keep:
        case "upper":
            known[:, :rows] = True
        case "lower":
            known[:, grid[0] - rows :] = True
        case "left":
            known[:, :, :columns] = True
        case _:
            known[:, :, grid[1] - columns :] = True
    if not known.any():
        raise UserError(f"a picture of {grid[0]}x{grid[1]} cells has no {keep} half to keep")
    return known


def variation_known(grid: Grid, strength: float, seed: int, from_row: int | None = None) -> Tensor:
    """Known cells (1, h, w) of a variation: all but a share `strength` of them, chosen at random by `seed`;
    or, with `from_row`, the rows of cells above it.

    Raises UserError for a strength outside of (0, 1], and a row that is not in the picture.
    """
    height, width = grid
    if from_row is not None:
        if not 0 <= from_row < height:
            raise UserError(f"row {from_row} is not one of the picture's rows of cells, 0 to {height - 1}")
        return (torch.arange(height) < from_row)[None, :, None].expand(1, height, width).clone()
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength} is not in (0, 1]: the share of cells that are painted anew")
    count = height * width
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    known = torch.ones(count, dtype=torch.bool)
    known[shuffled[: max(round(strength * count), 1)]] = False
    return known.view(1, height, width)


def soft_mask(mask: Tensor, border: int) -> Tensor:
    """How much of the new picture shows, (B, 1, H, W) in [0, 1], for a pixel mask (B, H, W).

    0 outside of the mask, so that nothing there changes; within it rising to 1 over `border` pixels from its
    edge. The picture's own border is no edge. Raises UserError for a negative border.
    """
    if border < 0:
        raise UserError(f"soft border {border} is negative; it is a width in pixels")
    inside = mask[:, None].float()
    total = inside.clone()
    for _ in range(border):
        # Pixels whose whole 3x3 neighbourhood was still inside: one pixel further from the edge.
        inside = -functional.max_pool2d(-functional.pad(inside, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        total += inside
    return total / (border + 1)


def composite(original: Tensor, painted: Tensor, mask: Tensor, border: int = 0) -> Tensor:
    """`original` (B, C, H, W) outside of the pixel mask (B, H, W), bit for bit, and `painted` within it."""
    share = soft_mask(mask, border).to(painted)
    mixed = torch.lerp(original, painted, share)
    return torch.where(rearrange(mask, "b h w -> b 1 h w"), mixed, original)
