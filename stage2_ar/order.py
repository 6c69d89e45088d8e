"""In which order the cells of a grid are written (Esser et al. 2021, section 4.3 and appendix).

An order is a permutation: its n-th entry is the raster index of the cell that is written n-th.

Axes: N = h * w cells, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from taming.config import Config

Grid = tuple[int, int]
OrderKind = Literal[
    "raster", "alternating", "z_curve", "spiral_out", "spiral_in", "random", "subsample", "given"
]


class OrderConfig(Config):
    """The order of a model's cells.

    raster: row by row. alternating: every second row backwards. z_curve: Morton's order, columns first.
    spiral_out: from the centre outwards, clockwise; spiral_in: the same backwards. random: a fixed
    permutation drawn from `seed`. subsample: every second cell of every second row first, and those
    recursively, then the phases between. given: as listed in `cells`.
    """

    kind: OrderKind = "raster"
    seed: int = Field(0, ge=0, description="of kind random")
    cells: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="of kind given: raster indices in the order of writing"
    )

    @model_validator(mode="after")
    def _cells_are_a_permutation(self) -> OrderConfig:
        if (self.cells is None) == (self.kind == "given"):
            raise ValueError("cells belongs to kind given: give both or none")
        if self.cells is not None and sorted(self.cells) != list(range(len(self.cells))):
            raise ValueError(f"cells does not hold each of 0 to {len(self.cells) - 1} once")
        return self


def cells_in_order(order: OrderConfig, grid: Grid) -> Tensor:
    """The raster index of the n-th cell written: (N,) int64.

    Raises ValueError for kind given on a grid of another size.
    """
    height, width = grid
    count = height * width
    key: Callable[[int, int, int, int], tuple[int, ...]]
    match order.kind:
        case "raster":
            return torch.arange(count)
        case "random":
            return torch.randperm(count, generator=torch.Generator().manual_seed(order.seed))
        case "given":
            assert order.cells is not None
            if len(order.cells) != count:
                raise ValueError(f"order.cells lists {len(order.cells)} cells, the grid has {height}x{width}")
            return torch.tensor(order.cells, dtype=torch.int64)
        case "spiral_out" | "spiral_in":
            outwards = _spiral(height, width)
            return torch.tensor(outwards if order.kind == "spiral_out" else outwards[::-1])
        case "alternating":
            key = _alternating
        case "z_curve":
            key = _z_curve
        case "subsample":
            key = _subsample
    return torch.tensor(
        sorted(range(count), key=lambda cell: key(cell // width, cell % width, height, width))
    )


def restricted(order: Tensor, grid: Grid, smaller: Grid) -> Tensor:
    """An order (N,) of `grid`, of those of its cells alone that lie in `smaller` at its upper left."""
    rows, columns = order // grid[1], order % grid[1]
    inside = (rows < smaller[0]) & (columns < smaller[1])
    return rows[inside] * smaller[1] + columns[inside]


def inverse(order: Tensor) -> Tensor:
    """When each cell is written: orders (..., N) -> ranks (..., N) by raster index."""
    return order.argsort(dim=-1)


def to_sequence(raster: Tensor, order: Tensor) -> Tensor:
    """Values (B, N, ...) by raster index -> in the order of writing; order (N,) or (B, N)."""
    if order.ndim == 1:
        return raster[:, order]
    index = order.reshape(*order.shape, *(1 for _ in raster.shape[2:])).expand(-1, -1, *raster.shape[2:])
    return raster.gather(1, index)


def to_raster(sequence: Tensor, order: Tensor) -> Tensor:
    """Values (B, N, ...) in the order of writing -> by raster index."""
    return to_sequence(sequence, inverse(order))


def _alternating(row: int, column: int, height: int, width: int) -> tuple[int, int]:
    return row, column if row % 2 == 0 else width - 1 - column


def _z_curve(row: int, column: int, height: int, width: int) -> tuple[int, ...]:
    bits = reversed(range(max(height, width).bit_length()))
    return tuple(2 * (row >> bit & 1) + (column >> bit & 1) for bit in bits)


def _subsample(row: int, column: int, height: int, width: int) -> tuple[int, ...]:
    levels = min(height, width).bit_length() - 1
    phases = (2 * (row >> level & 1) + (column >> level & 1) for level in range(levels))
    return (*phases, row >> levels, column >> levels)


def _spiral(height: int, width: int) -> list[int]:
    row, column = (height - 1) // 2, (width - 1) // 2
    cells, arm, direction = [row * width + column], 1, 0
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))
    while len(cells) < height * width:
        for _ in range(2):
            for _ in range(arm):
                row, column = row + steps[direction][0], column + steps[direction][1]
                if 0 <= row < height and 0 <= column < width:
                    cells.append(row * width + column)
            direction = (direction + 1) % 4
        arm += 1
    return cells
