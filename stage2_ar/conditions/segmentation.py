"""A segmentation map as one feature vector a cell.

Axes: B samples, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stage2_ar.conditions.base import Grid, check_range, whole_numbers
from stage2_ar.conditions.config import SegmentationConditionConfig
from stage2_ar.conditions.features import PictureCondition
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch


class SegmentationCondition(PictureCondition):
    """(B, H, W) int64 labels, each embedded by itself."""

    keys: Mapping[str, str] = {"segmentation": "segmentation"}
    name = "segmentation"

    def __init__(self, config: SegmentationConditionConfig, *, width: int, downsample_factor: int) -> None:
        factor = downsample_factor
        super().__init__(
            config, width=width, downsample_factor=factor, channels=config.label_dim, patch_size=factor
        )
        self.num_labels = config.num_labels
        self.label_embedding = nn.Embedding(config.num_labels, config.label_dim)

    def check(self, batch: Batch, grid: Grid) -> None:
        if "segmentation" not in batch:
            raise UserError("the segmentation condition needs label maps; the data has none")
        labels = batch["segmentation"]
        height, width = self.picture_size(grid)
        if labels.ndim != 3 or labels.shape[1:] != (height, width):
            raise UserError(
                f"segmentation of shape {tuple(labels.shape)} does not fit: a picture of {height}x{width} "
                f"pixels needs (B, {height}, {width})"
            )
        check_range("segmentation label", labels, self.num_labels, "labels")

    def check_data(self, data: PictureDataset) -> None:
        if "segmentation" not in data.provides:
            raise UserError(
                "condition.kind=segmentation needs label maps, and the data has none; set "
                "data.segmentation to their folder and data.num_labels"
            )
        if data.num_labels > self.num_labels:
            raise UserError(
                f"the data has {data.num_labels} labels, but condition.num_labels is {self.num_labels}; "
                f"set condition.num_labels={data.num_labels}"
            )

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"segmentation": torch.zeros(batch_size, *self.picture_size(grid), dtype=torch.int64)}

    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        embedded: Tensor = self.label_embedding(batch["segmentation"])
        return embedded

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return whole_numbers(name, value)[None] if value.ndim == 2 else whole_numbers(name, value)
