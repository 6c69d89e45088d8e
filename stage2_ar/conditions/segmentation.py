"""A segmentation map as one feature vector a cell.

Each pixel's label is embedded, the labels of a cell are projected together, and a few convolutions over the
cells tell each what lies around it, below and to the right included, where no code has been written yet.

Axes: B samples, H W pixels, h w cells, f downsample factor, C hidden channels, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.conditions.base import Condition, Grid, all_attended, check_range, whole_numbers
from stage2_ar.conditions.config import SegmentationConditionConfig
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch, Prefix


class SegmentationCondition(Condition):
    """Features added to each cell's input ("aligned"), or as h * w positions before the codes ("prefix")."""

    keys: ClassVar[Mapping[str, str]] = {"segmentation": "segmentation"}

    def __init__(self, config: SegmentationConditionConfig, *, width: int, downsample_factor: int) -> None:
        super().__init__(config.dropout)
        self.num_labels = config.num_labels
        self.aligned = config.placement == "aligned"
        self.downsample_factor = downsample_factor
        self.label_embedding = nn.Embedding(config.num_labels, config.label_dim)
        # A convolution of stride f in other words. As one, oneDNN computes it wrongly in bf16 for 8 to 24
        # channels and f >= 4 (torch 2.15, CPU: docs/log.md).
        self.patch = nn.Linear(config.label_dim * downsample_factor**2, config.hidden_width)
        self.context = nn.ModuleList(ContextBlock(config.hidden_width) for _ in range(config.context_layers))
        self.norm = nn.LayerNorm(config.hidden_width)
        self.out = nn.Linear(config.hidden_width, width)
        # At the scale of the codes' embeddings, so that neither drowns the other at first.
        nn.init.normal_(self.out.weight, std=0.02 / config.hidden_width**0.5)
        nn.init.zeros_(self.out.bias)
        self.start = nn.Parameter(torch.randn(width) * 0.02) if self.aligned else None
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None

    def prefix_length(self, grid: Grid) -> int:
        return 1 if self.aligned else grid[0] * grid[1]

    def check(self, batch: Batch, grid: Grid) -> None:
        if "segmentation" not in batch:
            raise UserError("the segmentation condition needs label maps; the data has none")
        labels = batch["segmentation"]
        height, width = (side * self.downsample_factor for side in grid)
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
        height, width = (side * self.downsample_factor for side in grid)
        return {"segmentation": torch.zeros(batch_size, height, width, dtype=torch.int64)}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        return self._prefix(self.features(batch["segmentation"]), grid)

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this segmentation condition was trained without dropout: it has no null to guide away from"
            )
        return self._prefix(self.null_embedding.to(device).expand(batch_size, *grid, -1), grid)

    def features(self, labels: Tensor) -> Tensor:
        """labels (B, H, W) int64 -> (B, h, w, D)."""
        factor = self.downsample_factor
        patches = rearrange(
            self.label_embedding(labels), "b (h p) (w q) c -> b h w (p q c)", p=factor, q=factor
        )
        x = rearrange(self.patch(patches), "b h w c -> b c h w")
        for block in self.context:
            x = block(x)
        out: Tensor = self.out(self.norm(rearrange(x, "b c h w -> b h w c")))
        return out

    def _prefix(self, features: Tensor, grid: Grid) -> Prefix:
        if self.start is not None:
            start = self.start.expand(features.shape[0], 1, -1)
            return Prefix(start, all_attended(start), cells=features)
        positions = rearrange(features, "b h w d -> b (h w) d")
        return Prefix(positions, all_attended(positions), segments=(grid,))

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return whole_numbers(name, value)[None] if value.ndim == 2 else whole_numbers(name, value)


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
