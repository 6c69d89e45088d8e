"""A second picture as one feature vector a cell: the other one of a pair, the same in fewer pixels, or edges.

The last two are made of the pictures themselves in training, so that any folder will do.

Axes: B samples, C channels, H W pixels, h w cells, s scale, p pixels a cell and side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from stage2_ar.conditions.base import Grid
from stage2_ar.conditions.config import ImageConditionConfig
from stage2_ar.conditions.features import (
    PictureCondition,
    check_channels,
    check_pixels,
    needs_pictures,
    real_numbers,
)
from taming.data.dataset import PictureDataset
from taming.data.edges import canny
from taming.errors import UserError
from taming.types import Batch

PIXELS = "floats in [-1, 1]: uint8.float() / 127.5 - 1"


def build_image_condition(
    config: ImageConditionConfig, *, width: int, downsample_factor: int
) -> SecondPictureCondition | LowResolutionCondition | EdgesCondition:
    """The condition of a config's `source`; for all of them the user's key is "image"."""
    match config.source:
        case "condition_image":
            return SecondPictureCondition(config, width=width, downsample_factor=downsample_factor)
        case "low_resolution":
            return LowResolutionCondition(config, width=width, downsample_factor=downsample_factor)
        case "edges":
            return EdgesCondition(config, width=width, downsample_factor=downsample_factor)


class SecondPictureCondition(PictureCondition):
    """The other picture of a pair, (B, C, H, W) in [-1, 1]: a sketch, another season, another domain."""

    keys: Mapping[str, str] = {"image": "condition_image"}
    name = "image"

    def __init__(self, config: ImageConditionConfig, *, width: int, downsample_factor: int) -> None:
        factor, self.channels = downsample_factor, config.num_channels
        super().__init__(
            config, width=width, downsample_factor=factor, channels=config.num_channels, patch_size=factor
        )

    def check(self, batch: Batch, grid: Grid) -> None:
        if "condition_image" not in batch:
            raise UserError("the image condition needs second pictures; the data has none")
        height, width = size = self.picture_size(grid)
        painted = f"a picture of {height}x{width} pixels"
        check_pixels("image", batch["condition_image"], self.channels, size, (-1, 1), painted)

    def check_data(self, data: PictureDataset) -> None:
        if "condition_image" not in data.provides:
            raise needs_pictures(
                "condition.source=condition_image",
                data,
                "condition_image",
                "set data.condition_image to the folder of the second pictures",
            )
        option = "condition.channels (or data.condition_channels)"
        check_channels(self.name, "condition_image", self.channels, data, option)

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"condition_image": torch.zeros(batch_size, self.channels, *self.picture_size(grid))}

    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        return rearrange(batch["condition_image"].float(), "b c h w -> b h w c")

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return real_numbers(name, value, PIXELS)


class LowResolutionCondition(PictureCondition):
    """The picture in s x s times fewer pixels, (B, C, H / s, W / s) in [-1, 1]: super-resolution.

    Where the pixels of a cell are no whole number, or fewer than one, the low resolution is enlarged
    (bilinear) to the next whole number p of pixels a cell.
    """

    keys: Mapping[str, str] = {"image": "low_resolution"}
    name = "low-resolution"

    def __init__(self, config: ImageConditionConfig, *, width: int, downsample_factor: int) -> None:
        assert config.scale is not None
        self.scale, self.channels = config.scale, config.num_channels
        super().__init__(
            config,
            width=width,
            downsample_factor=downsample_factor,
            channels=config.num_channels,
            patch_size=math.ceil(downsample_factor / config.scale),
        )

    def derive(self, batch: Batch) -> Batch:
        """Adds `low_resolution`, the mean of each s x s pixels of `image`, where there is only that."""
        if "low_resolution" in batch or "image" not in batch:
            return batch
        image: Tensor = batch["image"]
        self._check_divides((image.shape[2], image.shape[3]))
        return {**batch, "low_resolution": functional.avg_pool2d(image, self.scale)}

    def check(self, batch: Batch, grid: Grid) -> None:
        if "low_resolution" not in batch:
            raise UserError("the low-resolution condition needs pictures to make small; the data has none")
        height, width = self.picture_size(grid)
        painted = f"a picture of {height}x{width} pixels at scale {self.scale}"
        check_pixels("image", batch["low_resolution"], self.channels, self.small_size(grid), (-1, 1), painted)

    def check_data(self, data: PictureDataset) -> None:
        if "low_resolution" not in data.provides:
            if "image" not in data.provides:
                raise needs_pictures("condition.source=low_resolution", data, "image", "give pictures")
            self._check_divides(data.size)
            option = "condition.channels (or data.channels)"
            check_channels(self.name, "image", self.channels, data, option)

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"low_resolution": torch.zeros(batch_size, self.channels, *self.small_size(grid))}

    def small_size(self, grid: Grid) -> tuple[int, int]:
        """(H / s, W / s) of a picture of so many cells. Raises UserError where those are not whole."""
        height, width = self.picture_size(grid)
        self._check_divides((height, width))
        return height // self.scale, width // self.scale

    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        small = batch["low_resolution"].float()
        size = (grid[0] * self.patch_size, grid[1] * self.patch_size)
        if small.shape[2:] != size:
            small = functional.interpolate(small, size, mode="bilinear", align_corners=False)
        return rearrange(small, "b c h w -> b h w c")

    def _check_divides(self, size: tuple[int, int]) -> None:
        if size[0] % self.scale or size[1] % self.scale:
            step = math.lcm(self.scale, self.downsample_factor)
            near = "x".join(str(max(side // step, 1) * step) for side in size)
            raise UserError(
                f"a picture of {size[0]}x{size[1]} pixels cannot be made {self.scale} times smaller in whole "
                f"pixels (condition.scale); use {near}"
            )

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return real_numbers(name, value, PIXELS)


class EdgesCondition(PictureCondition):
    """Edges, (B, 1, H, W) in [0, 1], 1 on an edge; of a picture that a user gives they are taken (Canny)."""

    keys: Mapping[str, str] = {"image": "edges"}
    name = "edges"

    def __init__(self, config: ImageConditionConfig, *, width: int, downsample_factor: int) -> None:
        factor = downsample_factor
        super().__init__(config, width=width, downsample_factor=factor, channels=1, patch_size=factor)

    def derive(self, batch: Batch) -> Batch:
        """Adds `edges` of `image`, where there is only that."""
        if "edges" in batch or "image" not in batch:
            return batch
        return {**batch, "edges": edges_of(batch["image"])}

    def check(self, batch: Batch, grid: Grid) -> None:
        if "edges" not in batch:
            raise UserError("the edges condition needs pictures to take edges of; the data has none")
        height, width = size = self.picture_size(grid)
        painted = f"a picture of {height}x{width} pixels"
        check_pixels("edges", batch["edges"], 1, size, (0, 1), painted)

    def check_data(self, data: PictureDataset) -> None:
        if not {"edges", "image"} & data.provides:
            raise needs_pictures("condition.source=edges", data, "image", "give pictures")

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"edges": torch.zeros(batch_size, 1, *self.picture_size(grid))}

    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        return rearrange(batch["edges"].float() * 2 - 1, "b c h w -> b h w c")

    def _shape(self, name: str, value: Tensor) -> Tensor:
        value = real_numbers(name, value, "an edge map in [0, 1], or a picture in [-1, 1]")
        return value if value.ndim != 4 or value.shape[1] == 1 else edges_of(value)


def edges_of(images: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] -> their edges (B, 1, H, W), 1 on an edge and 0 elsewhere."""
    return (canny(images) + 1) / 2
