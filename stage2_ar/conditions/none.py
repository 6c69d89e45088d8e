"""No condition: the sequence begins with one start token."""

from __future__ import annotations

import torch
from torch import nn

from stage2_ar.conditions.base import Condition, Grid, all_attended, batch_size_of
from stage2_ar.conditions.config import NoConditionConfig
from taming.data.dataset import PictureDataset
from taming.types import Batch, Prefix


class NoCondition(Condition):
    """A learned start token, or a fixed entry of the transformer's table."""

    def __init__(self, config: NoConditionConfig, *, width: int) -> None:
        super().__init__()
        self.start_token = config.start_token
        self.start = nn.Parameter(torch.randn(width) * 0.02) if config.start_token is None else None

    def prefix_length(self, grid: Grid) -> int:
        return 1

    def check(self, batch: Batch, grid: Grid) -> None:
        batch_size_of(batch)

    def check_data(self, data: PictureDataset) -> None:
        """Any data will do."""

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"key": [str(number) for number in range(batch_size)]}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        """The start token for as many samples as the batch has entries of any kind."""
        device = self._start().device
        return self.null(batch_size_of(batch), grid, device)

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        embeddings = self._start().to(device).expand(batch_size, 1, -1)
        return Prefix(embeddings, all_attended(embeddings))

    def _start(self) -> torch.Tensor:
        if self.start is not None:
            return self.start
        assert self.start_token is not None
        return self.shared_table.weight[self.start_token]
