"""Square windows of a grid of tokens, shifted or not (Swin Transformer, Liu et al. 2021, arXiv:2103.14030).

Axes: B pictures, h w cells of the grid, p cells of a window's side, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def to_windows(x: Tensor, grid: tuple[int, int], window: int, shift: int = 0) -> Tensor:
    """(B, h w, D) -> (B n, p p, D), the n windows of a picture side by side; h and w are multiples of p.

    `shift` moves the grid up and left by so many cells first; what leaves comes in again on the other side.
    An axis of one window is not moved.
    """
    cells = rearrange(x, "b (h w) d -> b h w d", h=grid[0], w=grid[1])
    down, right = _shifts(grid, window, shift)
    if down or right:
        cells = torch.roll(cells, (-down, -right), dims=(1, 2))
    return rearrange(cells, "b (i p) (j q) d -> (b i j) (p q) d", p=window, q=window)


def from_windows(windows: Tensor, grid: tuple[int, int], window: int, shift: int = 0) -> Tensor:
    """(B n, p p, D) -> (B, h w, D): back from `to_windows`."""
    rows, columns = grid[0] // window, grid[1] // window
    cells = rearrange(windows, "(b i j) (p q) d -> b (i p) (j q) d", i=rows, j=columns, p=window, q=window)
    down, right = _shifts(grid, window, shift)
    if down or right:
        cells = torch.roll(cells, (down, right), dims=(1, 2))
    return rearrange(cells, "b h w d -> b (h w) d")


def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device | str = "cpu") -> Tensor:
    """(n, p p, p p) bool: which cells of a shifted window lie side by side in the picture, True = attend.

    In the windows at the end of a shifted grid, cells from both ends of the picture meet.
    """
    height, width = grid
    down, right = _shifts(grid, window, shift)
    row = _region(height, window, down, device)[:, None]
    column = _region(width, window, right, device)[None, :]
    region = rearrange(3 * row + column, "(i p) (j q) -> (i j) (p q)", p=window, q=window)
    return region[:, :, None] == region[:, None, :]


def _shifts(grid: tuple[int, int], window: int, shift: int) -> tuple[int, int]:
    """(down, right): what each axis is shifted by; a single window would only be cut in two."""
    height, width = grid
    return (shift if height > window else 0, shift if width > window else 0)


def _region(size: int, window: int, shift: int, device: torch.device | str) -> Tensor:
    """(size,): 0 before the last window, 1 for its part from the same end, 2 for what came in."""
    place = torch.arange(size, device=device)
    return (place >= size - window).long() + (place >= size - shift).long()
