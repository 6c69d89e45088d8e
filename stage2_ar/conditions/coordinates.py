"""Where each cell lies in the whole picture, so that crops tell of it (Esser et al. 2021, Sec. 3.3).

Nothing is asked of the user: training reads where each crop was taken from, sampling paints a whole picture.

Axes: B samples, H W pixels, h w cells, F frequencies, D width.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.conditions.base import Condition, Grid, all_attended, batch_size_of
from stage2_ar.conditions.config import CoordinatesConditionConfig
from taming.data.dataset import PictureDataset
from taming.errors import ConfigError, UserError
from taming.types import Batch, Prefix


def build_coordinates_condition(
    config: CoordinatesConditionConfig, *, width: int, downsample_factor: int
) -> CoordinatesCondition | CoordinateTokensCondition:
    """Features of each cell, or, where `config.levels` is set, the published tokens."""
    if config.levels is not None:
        return CoordinateTokensCondition(config, downsample_factor=downsample_factor)
    return CoordinatesCondition(config, width=width)


class CoordinatesCondition(Condition):
    """Fourier features of a cell's row and column through a small MLP, added to the cell's input."""

    def __init__(self, config: CoordinatesConditionConfig, *, width: int) -> None:
        super().__init__(config.dropout)
        self.frequencies = config.frequencies
        self.hidden = nn.Linear(2 + 4 * config.frequencies, config.hidden_width)
        self.out = nn.Linear(config.hidden_width, width)
        # At the scale of the codes' embeddings, so that neither drowns the other at first.
        nn.init.normal_(self.out.weight, std=0.02 / config.hidden_width**0.5)
        nn.init.zeros_(self.out.bias)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None

    def prefix_length(self, grid: Grid) -> int:
        return 1

    def check(self, batch: Batch, grid: Grid) -> None:
        check_crop(batch)

    def check_data(self, data: PictureDataset) -> None:
        """Any data will do; of one that does not crop every picture is a whole one."""

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"crop": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(batch_size, 1)}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        places = cell_centres(crop_of(batch, self.start.device), grid)
        # Half precision could not tell the angles of neighbours apart, but it can their sines.
        features = fourier(places, self.frequencies).to(self.hidden.weight.dtype)
        return self._prefix(self.out(functional.gelu(self.hidden(features))))

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this coordinates condition was trained without dropout: it has no null to guide away from"
            )
        return self._prefix(self.null_embedding.to(device).expand(batch_size, *grid, -1))

    def _prefix(self, features: Tensor) -> Prefix:
        start = self.start.expand(features.shape[0], 1, -1)
        return Prefix(start, all_attended(start), cells=features)


class CoordinateTokensCondition(Condition):
    """The published form: h * w tokens round(levels * c) of the transformer's table.

    c in [0, 1) is a pixel's raster index over the pixels of the whole picture, averaged over each cell.
    """

    def __init__(self, config: CoordinatesConditionConfig, *, downsample_factor: int) -> None:
        super().__init__(0.0)
        assert config.levels is not None
        self.levels = config.levels
        self.downsample_factor = downsample_factor

    def attach(self, token_embedding: nn.Embedding) -> None:
        """Raises ConfigError where the table has fewer entries than there are levels."""
        if token_embedding.num_embeddings < self.levels:
            raise ConfigError(
                f"condition.levels {self.levels} is more than the transformer's table of "
                f"{token_embedding.num_embeddings} entries; make it smaller, or set transformer.table_size"
            )
        super().attach(token_embedding)

    def prefix_length(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def check(self, batch: Batch, grid: Grid) -> None:
        check_crop(batch)

    def check_data(self, data: PictureDataset) -> None:
        """Any data will do; of one that does not crop every picture is a whole one."""

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"crop": torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(batch_size, 1)}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        table = self.shared_table
        positions = table(self.tokens(crop_of(batch, table.weight.device), grid).flatten(1))
        return Prefix(positions, all_attended(positions), segments=(grid,))

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        raise UserError(
            "this coordinates condition was trained without dropout: it has no null to guide away from"
        )

    def tokens(self, crop: Tensor, grid: Grid) -> Tensor:
        """crop (B, 4) -> (B, h, w) int64."""
        maps = raster_map(crop, (grid[0] * self.downsample_factor, grid[1] * self.downsample_factor))
        pooled = functional.adaptive_avg_pool2d(maps, grid)[:, 0].clamp(0, 1)
        # The last token of a very large picture would lie outside of a table of `levels` entries.
        return (self.levels * pooled).round().long().clamp(max=self.shared_table.num_embeddings - 1)


def check_crop(batch: Batch) -> None:
    """Raises UserError where the batch's crops are no frames within their pictures."""
    crop = batch.get("crop")
    if crop is None:
        return
    if crop.ndim != 2 or crop.shape[1] != 4:
        raise UserError(f"crop of shape {tuple(crop.shape)} is not (B, 4): x0, y0, x1, y1 of each sample")
    if not bool(((crop >= 0) & (crop <= 1)).all() and (crop[:, :2] < crop[:, 2:]).all()):
        raise UserError("crop holds frames that are not x0 < x1 and y0 < y1 within [0, 1]")


def crop_of(batch: Batch, device: torch.device) -> Tensor:
    """Each sample's frame (x0, y0, x1, y1) in its picture, (B, 4) float64; the whole where none is given."""
    crop = batch.get("crop")
    if crop is None:
        return torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64, device=device).repeat(
            batch_size_of(batch), 1
        )
    return torch.as_tensor(crop, device=device).double()


def cell_centres(crop: Tensor, grid: Grid) -> Tensor:
    """crop (B, 4) -> (B, h, w, 2): row and column of each cell's centre in the whole picture, in [0, 1]."""
    axes = []
    for first, last, count in ((1, 3, grid[0]), (0, 2, grid[1])):
        share = (torch.arange(count, device=crop.device, dtype=crop.dtype) + 0.5) / count
        axes.append(crop[:, first, None] + share * (crop[:, last, None] - crop[:, first, None]))
    rows, columns = axes
    shape = (len(crop), *grid)
    return torch.stack((rows[:, :, None].expand(shape), columns[:, None, :].expand(shape)), dim=-1)


def fourier(places: Tensor, frequencies: int) -> Tensor:
    """(..., 2) in [0, 1] -> (..., 2 + 4 F): themselves, and sine and cosine of 2^k pi times them, k < F."""
    scales = math.pi * 2.0 ** torch.arange(frequencies, device=places.device, dtype=places.dtype)
    angles = rearrange(places[..., None] * scales, "... two f -> ... (two f)")
    return torch.cat((places, angles.sin(), angles.cos()), dim=-1)


def raster_map(crop: Tensor, size: tuple[int, int]) -> Tensor:
    """crop (B, 4) of (H, W) pixels -> (B, 1, H, W) float32: raster index / number of pixels of the whole."""
    height, width = size
    whole_height = (height / (crop[:, 3] - crop[:, 1])).round()[:, None]
    whole_width = (width / (crop[:, 2] - crop[:, 0])).round()[:, None]
    rows = (crop[:, 1, None] * whole_height).round() + torch.arange(height, device=crop.device)
    columns = (crop[:, 0, None] * whole_width).round() + torch.arange(width, device=crop.device)
    index = rows[:, :, None] * whole_width[:, :, None] + columns[:, None, :]
    return (index / (whole_height * whole_width)[:, :, None])[:, None].float()
