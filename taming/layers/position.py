"""Rotary positions on a grid of cells.

Each head's channels are split in halves: the first turns with the cell's row, the second with its column
(RoPE, Su et al. 2021, applied to two axes as in EVA-02, Fang et al. 2023). A position without a cell gets
the identity. Nothing is stored: tables are rebuilt from the cells, so that there is no buffer which a
meta-device load could leave uninitialised.

Axes: T positions, C channels of one head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rotation = tuple[Tensor, Tensor]
"""(cos, sin), each (T, C / 2)."""


def grid_cells(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The (row, column) of each cell in raster order: (height * width, 2) int64."""
    index = torch.arange(height * width, device=device)
    return torch.stack((index // width, index % width), dim=-1)


def rotary_2d(cells: Tensor, head_dim: int, base: float = 10000.0) -> Rotation:
    """The rotation of cells (T, 2); a cell (0, 0) gives the identity, cos 1 and sin 0.

    `head_dim` must be divisible by 4: two axes, and two channels a plane. Frequencies of each axis are
    base^(-2 i / (head_dim / 2)) for i < head_dim / 4. Computed and returned in fp32.
    """
    assert head_dim % 4 == 0, f"head dimension {head_dim} is not divisible by 4"
    quarter = head_dim // 4
    exponents = torch.arange(quarter, device=cells.device, dtype=torch.float32) / quarter
    frequencies = base**-exponents
    angles = (cells.float()[..., None] * frequencies).flatten(-2)  # (T, 2, C/4) -> (T, C/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn x (..., T, C) by (cos, sin) of (T, C / 2): channel i is paired with channel i + C / 2."""
    cos, sin = (table.to(x.dtype) for table in rotation)
    if torch.is_grad_enabled() and x.requires_grad:
        turned: Tensor = _Rotate.apply(x, cos, sin)
        return turned
    return _turned(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The gradient of a turn is the turn back: autograd's own chain takes twice as many passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=a)
    a.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=b)
    b.addcmul_(first, sin)
    return out
