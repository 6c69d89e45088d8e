"""A map of inverse depth as one feature vector a cell.

Axes: B samples, H W pixels, h w cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from stage2_ar.conditions.base import Grid
from stage2_ar.conditions.config import DepthConditionConfig
from stage2_ar.conditions.features import PictureCondition, check_pixels, needs_pictures, real_numbers
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch


class DepthCondition(PictureCondition):
    """(B, 1, H, W) in [0, 1], 1 is nearest."""

    keys: Mapping[str, str] = {"depth": "depth"}
    name = "depth"

    def __init__(self, config: DepthConditionConfig, *, width: int, downsample_factor: int) -> None:
        factor = downsample_factor
        super().__init__(config, width=width, downsample_factor=factor, channels=1, patch_size=factor)

    def check(self, batch: Batch, grid: Grid) -> None:
        if "depth" not in batch:
            raise UserError("the depth condition needs depth maps; the data has none")
        height, width = size = self.picture_size(grid)
        painted = f"a picture of {height}x{width} pixels"
        check_pixels("depth", batch["depth"], 1, size, (0, 1), painted)

    def check_data(self, data: PictureDataset) -> None:
        if "depth" not in data.provides:
            raise needs_pictures("condition.kind=depth", data, "depth", "set data.depth to the maps' folder")

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"depth": torch.zeros(batch_size, 1, *self.picture_size(grid))}

    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        # Around zero, as pictures are.
        return rearrange(batch["depth"].float() * 2 - 1, "b c h w -> b h w c")

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return real_numbers(name, value, "floats in [0, 1], 1 being nearest")
