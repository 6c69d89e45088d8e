"""A layout of objects as features: a prefix position an object, and what covers each cell.

A prefix is [objects, largest first | padding, masked | start]. The start is learned, attended always, and
predicts the first code.

Axes: B layouts, N objects (max_objects), K classes, h w cells, F features of a place, C hidden channels,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.conditions.base import Grid
from stage2_ar.conditions.features import ContextBlock
from stage2_ar.conditions.layout import Layout, LayoutCondition, arranged
from stage2_ar.conditions.objects_config import ObjectFeaturesConfig, ObjectsConditionConfig
from taming.data.boxes import Box
from taming.errors import UserError
from taming.types import Prefix


class ObjectsCondition(LayoutCondition):
    """Class and place of each object through an MLP; with `aligned`, coverage by class added to each cell."""

    def __init__(self, config: ObjectsConditionConfig, encoding: ObjectFeaturesConfig, *, width: int) -> None:
        super().__init__(config)
        hidden, self.frequencies = encoding.hidden_width, encoding.frequencies
        coordinates = 4 if config.place == "box" else 2
        self.class_embedding = nn.Embedding(config.num_classes, hidden)
        self.place = nn.Linear(coordinates * (1 + 2 * encoding.frequencies), hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = _quiet_linear(hidden, width)
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None
        self.cells: CellFeatures | None = None
        self.null_cell: nn.Parameter | None = None
        if encoding.aligned:
            self.cells = CellFeatures(config.num_classes, hidden, encoding.context_layers, width)
            self.null_cell = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None

    def prefix_length(self, grid: Grid) -> int:
        return self.config.max_objects + 1

    def embed_layouts(self, layouts: Sequence[Layout], frames: Sequence[Box], grid: Grid) -> Prefix:
        """Objects are told relative to the frame; which part of a picture that is, is not told."""
        labels, boxes, mask = self._tensors(layouts)
        places = boxes if self.config.place == "box" else _centres(boxes)
        dtype = self.place.weight.dtype
        x = self.class_embedding(labels) + self.place(fourier(places, self.frequencies).to(dtype))
        x = self.norm(functional.gelu(self.hidden(functional.gelu(x))))
        objects = self.out(x) * mask[..., None]  # (B, N, D)
        start = self.start.expand(len(layouts), 1, -1)
        cells = None
        if self.cells is not None:
            cover = coverage if self.config.place == "box" else centre_cells
            cells = self.cells(cover(labels, boxes, mask, self.config.num_classes, grid).to(dtype))
        return Prefix(torch.cat((objects, start), dim=1), _with_start(mask), cells)

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this objects condition was trained without dropout: it has no null to guide away from"
            )
        null = self.null_embedding.to(device)
        objects = null.new_zeros(batch_size, self.config.max_objects, len(null))
        mask = torch.zeros(objects.shape[:2], dtype=torch.bool, device=device)
        cells = None if self.null_cell is None else self.null_cell.to(device).expand(batch_size, *grid, -1)
        return Prefix(torch.cat((objects, null.expand(batch_size, 1, -1)), dim=1), _with_start(mask), cells)

    def _tensors(self, layouts: Sequence[Layout]) -> tuple[Tensor, Tensor, Tensor]:
        """Layouts as labels (B, N) int64, boxes (B, N, 4) float32, and a mask (B, N) of what is there."""
        most = self.config.max_objects
        labels = torch.zeros(len(layouts), most, dtype=torch.int64)
        boxes = torch.zeros(len(layouts), most, 4)
        mask = torch.zeros(len(layouts), most, dtype=torch.bool)
        for row, layout in enumerate(layouts):
            kept = arranged(layout, most)
            if kept:
                labels[row, : len(kept)] = torch.tensor([item["label"] for item in kept])
                boxes[row, : len(kept)] = torch.tensor([item["box"] for item in kept])
                mask[row, : len(kept)] = True
        device = self.start.device
        return labels.to(device), boxes.to(device), mask.to(device)


class CellFeatures(nn.Module):
    """Coverage by class (B, h, w, K) -> what is added to each cell (B, h, w, D); far from boxes, nothing.

    What an empty layout would say is taken off: one vector on all empty cells drowned the codes at first
    (61 steps on the scenes, one seed: a loss of 6.73 bits a code with it taken off, 6.96 without).
    """

    def __init__(self, num_classes: int, hidden: int, context_layers: int, width: int) -> None:
        super().__init__()
        self.classes = nn.Linear(num_classes, hidden)
        self.context = nn.ModuleList(ContextBlock(hidden) for _ in range(context_layers))
        self.norm = nn.LayerNorm(hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.out.weight, std=0.02 / hidden**0.5)

    def forward(self, covered: Tensor) -> Tensor:
        empty = self._features(torch.zeros_like(covered[:1]))
        told: Tensor = self.out(self._features(covered) - empty)
        return told

    def _features(self, covered: Tensor) -> Tensor:
        """(B, h, w, K) -> (B, h, w, C)."""
        x = rearrange(self.classes(covered), "b h w c -> b c h w")
        for block in self.context:
            x = block(x)
        normed: Tensor = self.norm(rearrange(x, "b c h w -> b h w c"))
        return normed


def fourier(values: Tensor, frequencies: int) -> Tensor:
    """(..., n) in [0, 1] -> (..., n (1 + 2 F)): each value, and its sines and cosines at 2^k pi.

    As in NeRF (Mildenhall et al. 2020, Eq. 4): an MLP of the bare number would see places too dimly.
    """
    steps = torch.pi * 2.0 ** torch.arange(frequencies, device=values.device, dtype=torch.float32)
    phases = values[..., None] * steps  # (..., n, F)
    features = torch.cat((values[..., None], phases.sin(), phases.cos()), dim=-1)
    return rearrange(features, "... n f -> ... (n f)")


def coverage(labels: Tensor, boxes: Tensor, mask: Tensor, num_classes: int, grid: Grid) -> Tensor:
    """How far boxes of each class cover each cell: (B, h, w, K) in [0, 1], the most that one box covers.

    labels (B, N), boxes (B, N, 4), mask (B, N). The maximum over boxes does not know their order.
    """
    across = _overlap(boxes[..., 0], boxes[..., 2], grid[1])  # (B, N, w)
    down = _overlap(boxes[..., 1], boxes[..., 3], grid[0])  # (B, N, h)
    shares = down[..., :, None] * across[..., None, :] * mask[..., None, None]  # (B, N, h, w)
    return _by_class(shares, labels, num_classes)


def centre_cells(labels: Tensor, boxes: Tensor, mask: Tensor, num_classes: int, grid: Grid) -> Tensor:
    """As `coverage`, of the one cell in which each box's centre lies."""
    centres = _centres(boxes)
    column = (centres[..., 0] * grid[1]).long().clamp(0, grid[1] - 1)
    row = (centres[..., 1] * grid[0]).long().clamp(0, grid[0] - 1)
    cell = functional.one_hot(row * grid[1] + column, grid[0] * grid[1]) * mask[..., None]  # (B, N, h w)
    shares = rearrange(cell, "b n (h w) -> b n h w", h=grid[0]).to(boxes.dtype)
    return _by_class(shares, labels, num_classes)


def _by_class(shares: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The most of shares (B, N, h, w) over objects of each class: (B, h, w, K)."""
    batch, _, height, width = shares.shape
    empty = shares.new_zeros(batch, num_classes, height, width)
    index = labels[..., None, None].expand_as(shares)
    return rearrange(empty.scatter_reduce(1, index, shares, "amax"), "b k h w -> b h w k")


def _overlap(start: Tensor, stop: Tensor, cells: int) -> Tensor:
    """The share of each of `cells` equal parts of [0, 1] that lies in [start, stop]: (..., cells)."""
    edges = torch.arange(cells + 1, device=start.device, dtype=start.dtype) / cells
    low = torch.maximum(start[..., None], edges[:-1])
    high = torch.minimum(stop[..., None], edges[1:])
    return (high - low).clamp(min=0) * cells


def _centres(boxes: Tensor) -> Tensor:
    """(..., 4) -> (..., 2): x and y of the middle."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _with_start(mask: Tensor) -> Tensor:
    """(B, N) -> (B, N + 1): the start after the objects is always attended."""
    return functional.pad(mask, (0, 1), value=True)


def _quiet_linear(channels: int, width: int) -> nn.Linear:
    """A projection of normed features to the scale of the codes' embeddings, so that neither drowns."""
    linear = nn.Linear(channels, width)
    nn.init.normal_(linear.weight, std=0.02 / channels**0.5)
    nn.init.zeros_(linear.bias)
    return linear
