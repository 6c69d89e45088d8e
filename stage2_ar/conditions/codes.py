"""The codes of a second tokenizer as a condition: of a map, edges, a second picture (Esser et al. 2021).

Its tokenizer is attached, never trained here, and lives beside the transformer in a saved pipeline. A window
of a larger picture sees the codes of one encoding of the whole map, cropped.

Axes: B samples, C channels, H W pixels, h w cells, K codes, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from stage1_vq import VQModel, tiling
from stage1_vq.inputs import one_hot
from stage2_ar.conditions.base import Condition, Grid, all_attended, check_range, whole_numbers
from stage2_ar.conditions.config import CodesConditionConfig
from stage2_ar.conditions.features import check_pixels, needs_pictures, real_numbers
from stage2_ar.conditions.image import edges_of
from taming.data.dataset import PictureDataset
from taming.errors import ArtifactError, ConfigError, UserError
from taming.types import Batch, Prefix

SOURCES = {
    "segmentation": ("segmentation", "segmentation"),
    "depth": ("depth", "depth"),
    "edges": ("image", "edges"),
    "image": ("image", "condition_image"),
    "condition_image": ("image", "condition_image"),
}
"""What the tokenizer is of -> (user's name of the condition, key of the batch)."""
MADE_OF_PICTURES = ("edges", "low_resolution")
"""Keys that need no more of the data than its pictures."""


class CodesCondition(Condition):
    """A row of its own table a code, added to each cell ("aligned") or as h * w positions ("prefix").

    With a shared vocabulary (published models) a code is the entry of that number in the transformer's table.
    """

    def __init__(self, config: CodesConditionConfig, *, width: int, downsample_factor: int) -> None:
        super().__init__(0.0 if config.shared_vocabulary else config.dropout)
        facts = config.facts
        if facts is None:
            raise ConfigError(
                "condition.kind=codes does not say whose codes: set condition.tokenizer to a saved tokenizer"
            )
        if config.resize is None and facts.downsample_factor != downsample_factor:
            raise ConfigError(
                f"the condition's tokenizer makes a cell of {facts.downsample_factor} pixels and the "
                f"picture's one of {downsample_factor}: the codes of a cell would lie elsewhere; use a "
                f"tokenizer of downsample factor {downsample_factor} for the condition"
            )
        self.config, self.facts = config, facts
        self.downsample_factor = downsample_factor
        self.name, self.key = SOURCES[facts.input]
        if config.scale is not None:
            if self.key != "condition_image":
                raise ConfigError(
                    f"condition.scale makes second pictures of pictures, but the condition's tokenizer is of "
                    f"{facts.input}; leave it out, or use a tokenizer of pictures"
                )
            self.key = "low_resolution"
        self.keys = {self.name: self.key}
        self.codes_key = f"{self.key}_codes"
        self.aligned = config.placement == "aligned"
        self.embedding: nn.Embedding | None = None
        if not config.shared_vocabulary:
            self.embedding = nn.Embedding(facts.codebook_size, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.start = nn.Parameter(torch.randn(width) * 0.02) if self.aligned else None
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None
        self._tokenizer = _Attached()

    @property
    def tokenizer(self) -> VQModel:
        """The condition's tokenizer. Raises UserError where none was attached."""
        if not self._tokenizer:
            raise UserError(
                f"the condition's tokenizer ({self.facts.tokenizer_hash[:12]}) is not there; a saved "
                "pipeline brings it along, else attach_tokenizer takes it"
            )
        return self._tokenizer[0]

    @property
    def has_tokenizer(self) -> bool:
        """Whether its tokenizer was attached."""
        return bool(self._tokenizer)

    def attach_tokenizer(self, tokenizer: VQModel) -> None:
        """Give the condition its tokenizer, which is frozen. Raises ArtifactError for another one."""
        if not tokenizer.makes_codes_of(self.facts.tokenizer_hash):
            raise ArtifactError(
                f"the condition was trained on codes of the tokenizer {self.facts.tokenizer_hash[:12]}, this "
                f"one is {tokenizer.codes_hash()[:12]}: its codes mean something else; use the one it was "
                "saved with"
            )
        self._tokenizer[:] = [tokenizer.eval().requires_grad_(False)]

    def attach(self, token_embedding: nn.Embedding) -> None:
        """Raises ConfigError where a shared table has fewer entries than there are codes."""
        if self.embedding is None and token_embedding.num_embeddings < self.facts.codebook_size:
            raise ConfigError(
                f"the condition's {self.facts.codebook_size} codes share the transformer's table, which has "
                f"{token_embedding.num_embeddings} entries; set transformer.table_size to as many at least"
            )
        super().attach(token_embedding)

    def prefix_length(self, grid: Grid) -> int:
        if self.aligned:
            return 1
        height, width = self._codes_grid(grid)
        return height * width

    def check(self, batch: Batch, grid: Grid) -> None:
        if self.codes_key in batch:
            codes = batch[self.codes_key]
            if codes.shape[1:] != self._codes_grid(grid):
                raise UserError(
                    f"{self.codes_key} of shape {tuple(codes.shape)} do not fit; a picture of "
                    f"{grid[0]}x{grid[1]} cells needs (B, {', '.join(map(str, self._codes_grid(grid)))})"
                )
            check_range(f"{self.name} code", codes, self.facts.codebook_size, "codes")
            return
        if self.key not in batch:
            raise UserError(f"this condition is made of {self.key}, and the data has none")
        value = batch[self.key]
        size = self._map_size(grid)
        if self.config.resize is not None:
            size = (int(value.shape[-2]), int(value.shape[-1]))
        painted = f"a picture of {size[0]}x{size[1]} pixels"
        if self.facts.input == "segmentation":
            if value.ndim != 3 or value.shape[1:] != size:
                raise UserError(
                    f"segmentation of shape {tuple(value.shape)} does not fit: {painted} needs "
                    f"(B, {size[0]}, {size[1]})"
                )
            check_range("segmentation label", value, self.facts.channels, "labels")
        else:
            bounds = (0, 1) if self.key in ("depth", "edges") else (-1, 1)
            check_pixels(self.name, value, self.facts.channels, size, bounds, painted)

    def check_data(self, data: PictureDataset) -> None:
        if self.key not in data.provides:
            made = self.key in MADE_OF_PICTURES
            key, else_set = ("image", "give pictures") if made else (self.key, f"set data.{self.key}")
            if key not in data.provides:
                raise needs_pictures(f"a condition of codes of {self.facts.input}", data, key, else_set)
        if self.key == "segmentation" and data.num_labels > self.facts.channels:
            raise UserError(
                f"the data has {data.num_labels} labels, but the condition's tokenizer was trained on "
                f"{self.facts.channels}; use one of this data's labels"
            )

    def derive(self, batch: Batch) -> Batch:
        """Adds `edges` or `low_resolution` of `image`, where there is only that."""
        if {self.key, self.codes_key} & batch.keys() or "image" not in batch:
            return batch
        if self.key == "edges":
            return {**batch, "edges": edges_of(batch["image"])}
        if self.key == "low_resolution":
            assert self.config.scale is not None
            image: Tensor = batch["image"]
            self._divided((image.shape[2], image.shape[3]))
            return {**batch, "low_resolution": functional.avg_pool2d(image, self.config.scale)}
        return batch

    def example(self, batch_size: int, grid: Grid) -> Batch:
        """A map and its codes, so that no tokenizer is needed for it."""
        shape = (batch_size, *self._map_size(grid))
        value = torch.zeros(shape, dtype=torch.int64)
        if self.key != "segmentation":
            value = torch.zeros(batch_size, self.facts.channels, *shape[1:])
        codes = torch.zeros(batch_size, *self._codes_grid(grid), dtype=torch.int64)
        return {self.key: value, self.codes_key: codes}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        codes = batch[self.codes_key] if self.codes_key in batch else self.encode(batch[self.key])
        table = self.shared_table if self.embedding is None else self.embedding
        return self._prefix(table(codes))

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this condition of codes was trained without dropout: it has no null to guide away from"
            )
        cells = self.null_embedding.to(device).expand(batch_size, *self._codes_grid(grid), -1)
        return self._prefix(cells)

    def encode(self, value: Tensor) -> Tensor:
        """The batch's map or picture -> codes (B, h, w) int64; in fp32, as the tokenizer was trained.

        Large ones are encoded one by one in tiles (stage1_vq.tiling), so that memory is bounded.
        """
        if len(value) > 1 and tiling.in_tiles(value.shape[-2], value.shape[-1], None):
            return torch.cat([self.encode(row) for row in value.split(1)])
        tokenizer = self.tokenizer.to(value.device)
        with torch.autocast(value.device.type, enabled=False):
            match self.key:
                case "segmentation":
                    pixels = one_hot(value, self.facts.channels)
                case "depth" | "edges":
                    pixels = value.float() * 2 - 1
                case _:
                    pixels = value.float()
            if self.config.resize is not None:
                pixels = functional.interpolate(pixels, size=(self.config.resize, self.config.resize))
            if self.config.scale is not None:
                pixels = functional.interpolate(pixels, scale_factor=self.config.scale, mode="bilinear")
            return tiling.encode(tokenizer, pixels)

    def _map_size(self, grid: Grid) -> tuple[int, int]:
        """(H, W) of the map of a picture of so many cells."""
        return self._divided((grid[0] * self.downsample_factor, grid[1] * self.downsample_factor))

    def _divided(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = self.config.scale or 1
        if size[0] % scale or size[1] % scale:
            step = math.lcm(scale, self.downsample_factor)
            near = "x".join(str(max(side // step, 1) * step) for side in size)
            raise UserError(
                f"a picture of {size[0]}x{size[1]} pixels cannot be made {scale} times smaller in whole "
                f"pixels (condition.scale); use {near}"
            )
        return size[0] // scale, size[1] // scale

    def _codes_grid(self, grid: Grid) -> Grid:
        if self.config.resize is None:
            return grid
        return (self.config.resize // self.facts.downsample_factor,) * 2

    def _prefix(self, features: Tensor) -> Prefix:
        """features (B, h, w, D)."""
        if self.start is not None:
            start = self.start.expand(features.shape[0], 1, -1)
            return Prefix(start, all_attended(start), cells=features)
        positions = rearrange(features, "b h w d -> b (h w) d")
        # A map that was resized has cells of its own: they speak of the whole picture.
        grid = None if self.config.resize is not None else ((features.shape[1], features.shape[2]),)
        return Prefix(positions, all_attended(positions), segments=grid)

    def _shape(self, name: str, value: Tensor) -> Tensor:
        if self.key == "segmentation":
            labels = whole_numbers(name, value)
            return labels[None] if labels.ndim == 2 else labels
        scaling = "floats in [0, 1]" if self.key == "depth" else "floats in [-1, 1]"
        pixels = real_numbers(name, value, scaling)
        if self.key == "edges" and pixels.ndim == 4 and pixels.shape[1] != 1:
            return edges_of(pixels)
        return pixels


class _Attached(list[VQModel]):
    """No module, so that a tokenizer is neither trained nor saved with the transformer; copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Attached:
        return self
