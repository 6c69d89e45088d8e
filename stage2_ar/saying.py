"""What is said about the pictures of a batch: a condition each, or one on its way to another.

Axes: n pictures, P prefix positions, h w cells, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stage2_ar.conditions.base import Condition, WindowPrefix, take_rows
from stage2_ar.order import Grid
from taming.errors import UserError
from taming.types import Batch, Prefix


@dataclass(frozen=True)
class Interpolation:
    """Conditions on the way from one to another, of any kind: `steps` of them, both ends among them.

    `first` and `second` are conditions of one row each, as `ARPipeline` takes them.
    """

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    steps: int = 5


@dataclass(frozen=True)
class Saying:
    """The conditions of n pictures."""

    batch: Batch
    toward: Batch | None = None
    weights: Tensor | None = None
    """(n,) in [0, 1]: 0 is `batch`, 1 is `toward`."""

    def rows(self, index: Tensor) -> Saying:
        """Those of some of the pictures, in the order of `index`."""
        if self.toward is None or self.weights is None:
            return Saying(take_rows(self.batch, index))
        weights = self.weights[index.to(self.weights.device)]
        return Saying(take_rows(self.batch, index), take_rows(self.toward, index), weights)

    def check(self, condition: Condition, grid: Grid) -> None:
        """Raises UserError where a condition does not fit a picture of `grid` cells."""
        for batch in (self.batch, self.toward):
            if batch is not None:
                condition.check(condition.derive(batch), grid)

    def prefix(self, condition: Condition, grid: Grid) -> Prefix:
        """For pictures of `grid` cells."""
        first = condition(self.batch, grid)
        if self.toward is None or self.weights is None:
            return first
        return between(first, condition(self.toward, grid), self.weights)

    def windows(self, condition: Condition, grid: Grid, size: Grid) -> WindowPrefix:
        """For windows of `size` cells of such pictures."""
        first = condition.windows(self.batch, grid, size)
        if self.toward is None or self.weights is None:
            return first
        second, weights = condition.windows(self.toward, grid, size), self.weights
        return lambda top, left: between(first(top, left), second(top, left), weights)


def between(first: Prefix, second: Prefix, weights: Tensor) -> Prefix:
    """Linear between two prefixes of one model, in embeddings and in cells; weights (n,) in [0, 1].

    A position that only one of them attends to is that one's on the way, and gone at the other end.
    Raises UserError for prefixes of different shapes.
    """
    if first.embeddings.shape != second.embeddings.shape:
        raise UserError(
            f"conditions of {first.embeddings.shape[1]} and {second.embeddings.shape[1]} positions have "
            "nothing between them"
        )
    weights = weights.to(first.embeddings)
    both = (first.mask & second.mask)[..., None]
    alone = torch.where(first.mask[..., None], first.embeddings, second.embeddings)
    mixed = torch.lerp(first.embeddings, second.embeddings, weights[:, None, None])
    mask = torch.where(
        (weights == 0)[:, None],
        first.mask,
        torch.where((weights == 1)[:, None], second.mask, first.mask | second.mask),
    )
    cells = None
    if first.cells is not None and second.cells is not None:
        cells = torch.lerp(first.cells, second.cells, weights[:, None, None, None])
    return replace(first, embeddings=torch.where(both, mixed, alone), mask=mask, cells=cells)
