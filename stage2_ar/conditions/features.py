"""What all conditions that are a picture or a map share: one feature vector a cell.

The pixels of a cell are projected together, and a few convolutions over the cells tell each what lies around
it, below and to the right included, where no code has been written yet.

Axes: B samples, H W pixels, h w cells, p pixels a cell and side, C channels of a pixel, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage1_vq.codes import KEPT_KEYS
from stage2_ar.conditions.base import Condition, Grid, all_attended
from stage2_ar.conditions.config import PictureConditionConfig
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch, Prefix

TOLERANCE = 1e-3
"""By which pixels may leave their range: what resampling and half precision do to them."""


class PictureCondition(Condition):
    """Features added to each cell's input ("aligned"), or as h * w positions before the codes ("prefix")."""

    name: ClassVar[str]
    """What it is called in errors."""

    def __init__(
        self,
        config: PictureConditionConfig,
        *,
        width: int,
        downsample_factor: int,
        channels: int,
        patch_size: int,
    ) -> None:
        """`channels` C of a pixel, and `patch_size` p a cell and side, of what `pixels` gives."""
        super().__init__(config.dropout)
        self.aligned = config.placement == "aligned"
        self.downsample_factor = downsample_factor
        self.patch_size = patch_size
        # A convolution of stride p in other words. As one, oneDNN computes it wrongly in bf16 for 8 to 24
        # channels and p >= 4 (torch 2.15, CPU: docs/log.md).
        self.patch = nn.Linear(channels * patch_size**2, config.hidden_width)
        self.context = nn.ModuleList(ContextBlock(config.hidden_width) for _ in range(config.context_layers))
        self.norm = nn.LayerNorm(config.hidden_width)
        self.out = nn.Linear(config.hidden_width, width)
        # At the scale of the codes' embeddings, so that neither drowns the other at first.
        nn.init.normal_(self.out.weight, std=0.02 / config.hidden_width**0.5)
        nn.init.zeros_(self.out.bias)
        self.start = nn.Parameter(torch.randn(width) * 0.02) if self.aligned else None
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None

    @abstractmethod
    def pixels(self, batch: Batch, grid: Grid) -> Tensor:
        """What the features are made of: (B, h * p, w * p, C), of a checked batch."""

    def prefix_length(self, grid: Grid) -> int:
        return 1 if self.aligned else grid[0] * grid[1]

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        return self._prefix(self.features(self.pixels(batch, grid)), grid)

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                f"this {self.name} condition was trained without dropout: it has no null to guide away from"
            )
        return self._prefix(self.null_embedding.to(device).expand(batch_size, *grid, -1), grid)

    def features(self, pixels: Tensor) -> Tensor:
        """pixels (B, h * p, w * p, C) -> (B, h, w, D)."""
        size = self.patch_size
        patches = rearrange(pixels, "b (h p) (w q) c -> b h w (p q c)", p=size, q=size)
        x = rearrange(self.patch(patches.to(self.patch.weight.dtype)), "b h w c -> b c h w")
        for block in self.context:
            x = block(x)
        out: Tensor = self.out(self.norm(rearrange(x, "b c h w -> b h w c")))
        return out

    def picture_size(self, grid: Grid) -> tuple[int, int]:
        """(H, W) of a picture of so many cells."""
        return grid[0] * self.downsample_factor, grid[1] * self.downsample_factor

    def _prefix(self, features: Tensor, grid: Grid) -> Prefix:
        if self.start is not None:
            start = self.start.expand(features.shape[0], 1, -1)
            return Prefix(start, all_attended(start), cells=features)
        positions = rearrange(features, "b h w d -> b (h w) d")
        return Prefix(positions, all_attended(positions), segments=(grid,))


class ContextBlock(nn.Module):
    """x + conv3(gelu(norm(x))): each cell looks one cell further."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Over a cell's channels only: statistics over the map would make a cell depend on the map's size.
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        normalised = rearrange(self.norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
        out: Tensor = x + self.conv(functional.gelu(normalised))
        return out


def real_numbers(name: str, value: Tensor, scaling: str) -> Tensor:
    """`value` as float32 with its batch axis: (C, H, W) -> (1, C, H, W).

    Raises UserError where it holds whole numbers; `scaling` says how those become what is wanted.
    """
    if not value.is_floating_point():
        raise UserError(f"condition {name!r} holds {value.dtype}; give {scaling}")
    return (value[None] if value.ndim == 3 else value).float()


def check_pixels(
    name: str, value: Tensor, channels: int, size: tuple[int, int], bounds: tuple[int, int], painted: str
) -> None:
    """Whether `value` is (B, channels, *size) within `bounds`. Raises UserError.

    `painted` names the picture that needs this size.
    """
    if value.ndim != 4 or value.shape[1:] != (channels, *size):
        raise UserError(
            f"{name} of shape {tuple(value.shape)} does not fit: {painted} needs "
            f"(B, {channels}, {size[0]}, {size[1]})"
        )
    low, high = (float(bound) for bound in torch.aminmax(value))
    # Written so that a NaN is refused too.
    if not (low >= bounds[0] - TOLERANCE and high <= bounds[1] + TOLERANCE):
        raise UserError(
            f"{name} holds values from {low:g} to {high:g}; scale it to [{bounds[0]}, {bounds[1]}]"
        )


def check_channels(name: str, key: str, channels: int, data: PictureDataset, option: str) -> None:
    """Whether the data's pictures `key` have so many channels. Raises UserError that names the `option`."""
    if not len(data):
        return
    found = data.sample(0, -1)[key].shape[0]
    if found != channels:
        raise UserError(
            f"the data's {key} has {found} channels, but the {name} condition is built for {channels}; "
            f"make {option} equal to it"
        )


def needs_pictures(what: str, data: PictureDataset, key: str, else_set: str) -> UserError:
    """The error where data does not give the batch's `key`, which `what` needs."""
    if "codes" in data.provides:
        kept = f" --keep {key}" if key in KEPT_KEYS else ""
        return UserError(
            f"{what} needs {key}, which these codes were stored without; encode data that has it again "
            f"with `taming vq encode{kept}`, or train on the pictures themselves (data.kind=folder and "
            "tokenizer=RUN)"
        )
    return UserError(f"{what} needs {key}, and the data has none; {else_set}")
