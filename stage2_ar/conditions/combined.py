"""Several conditions at once: a class and a map, a low resolution and a text.

Their prefixes stand one after another, and what they say of each cell is summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stage2_ar.conditions.base import Condition, Grid, WindowPrefix, join_prefixes
from taming.data.dataset import PictureDataset
from taming.errors import ConfigError, UserError
from taming.types import Batch, Prefix


class CombinedCondition(Condition):
    """Delegates to its parts.

    In training each part is left out by itself with its own dropout, and all of them at once with
    `dropout`: guidance goes away from saying nothing at all. Raises ConfigError where two parts have a
    key of the user in common, or a part that has no null shall be left out.
    """

    def __init__(self, parts: Sequence[Condition], *, dropout: float) -> None:
        super().__init__(dropout)
        keys: dict[str, str] = {}
        for part in parts:
            for name, key in part.keys.items():
                if name in keys:
                    raise ConfigError(
                        f"condition.conditions: two parts are given as {name!r}; combine conditions that "
                        "are told apart by their names"
                    )
                keys[name] = key
            if dropout > 0 and not part.has_null:
                what = " and ".join(part.keys) or type(part).__name__
                raise ConfigError(
                    f"condition.dropout {dropout:g} leaves all parts out at times, but {what} cannot be: set "
                    "that part's dropout above 0, or condition.dropout=0"
                )
        self.keys = keys
        self.parts = nn.ModuleList(parts)
        for number, part in enumerate(parts):
            part.part = f"{self.part}/{number}"

    @property
    def members(self) -> list[Condition]:
        """The parts, in the order of their prefixes."""
        return [part for part in self.parts if isinstance(part, Condition)]

    def prefix_length(self, grid: Grid) -> int:
        return sum(part.prefix_length(grid) for part in self.members)

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if not self.has_null:
            raise UserError(
                "this combined condition was trained without dropout: it has no null to guide away from"
            )
        return join_prefixes([part.null(batch_size, grid, device) for part in self.members])

    def derive(self, batch: Batch) -> Batch:
        for part in self.members:
            batch = part.derive(batch)
        return batch

    def check(self, batch: Batch, grid: Grid) -> None:
        for part in self.members:
            part.check(batch, grid)

    def check_data(self, data: PictureDataset) -> None:
        for part in self.members:
            part.check_data(data)

    def example(self, batch_size: int, grid: Grid) -> Batch:
        batch: Batch = {}
        for part in self.members:
            batch |= part.example(batch_size, grid)
        return batch

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        return join_prefixes([part.drop(part.embed(batch, grid), grid, batch) for part in self.members])

    def windows(self, batch: Batch, grid: Grid, size: Grid) -> WindowPrefix:
        parts = [part.windows(batch, grid, size) for part in self.members]
        return lambda top, left: join_prefixes([at(top, left) for at in parts])

    def null_windows(
        self, batch_size: int, grid: Grid, size: Grid, device: torch.device | str
    ) -> WindowPrefix:
        parts = [part.null_windows(batch_size, grid, size, device) for part in self.members]
        return lambda top, left: join_prefixes([at(top, left) for at in parts])

    def attach(self, token_embedding: nn.Embedding) -> None:
        super().attach(token_embedding)
        for part in self.members:
            part.attach(token_embedding)

    def read(self, conditions: Mapping[str, Any], device: torch.device | str = "cpu") -> Batch:
        self.refuse_unknown(conditions)
        batch: Batch = {}
        for part in self.members:
            own = {name: value for name, value in conditions.items() if name in part.keys}
            batch |= part.read(own, device)
        counts = {name: len(batch[key]) for name, key in self.keys.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise UserError(f"conditions differ in number: {told}; give each picture all of them")
        return batch
