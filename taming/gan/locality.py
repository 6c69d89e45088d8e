"""Locality-aware initialisation (TransGAN as first published, arXiv:2102.07074v1, 3.4).

A token sees its neighbours only at first, and farther as the training goes on: a transformer then starts
from what a convolution knows of pictures, and is free of it in the end.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config

ANY = -1
"""The width that stands for no limit."""


class LocalityConfig(Config):
    """How far a token sees. The paper's 4, 6, 8 and 10 end at epochs 22, 32, 42 and 60."""

    mode: Literal["raster", "window"] = "raster"
    """raster: at most `width` places on in the raster, as published: mainly in the same row; window: at
    most `width` rows and `width` columns on."""
    widths: tuple[int, ...] = Field((4, 6, 8, 10), min_length=1)
    until: tuple[float, ...] = (0.11, 0.16, 0.21, 0.3)
    """Share of the training at which each width ends; after the last a token sees all. The defaults are the
    paper's epochs in a training of 200."""

    @model_validator(mode="after")
    def _fits(self) -> LocalityConfig:
        if len(self.until) != len(self.widths):
            raise ValueError(f"until {self.until} does not fit widths {self.widths}: give one end a width")
        if min(self.widths) < 0:
            raise ValueError(f"widths {self.widths}: a token sees 0 or more places far")
        if not all(a < b for a, b in pairwise((0.0, *self.until))) or self.until[-1] > 1:
            raise ValueError(f"until {self.until} must rise and lie in (0, 1]")
        return self

    def width(self, progress: float) -> int | None:
        """How far a token sees at that share of the training; None for all."""
        for width, end in zip(self.widths, self.until, strict=True):
            if progress < end:
                return width
        return None


class Locality(nn.Module):
    """The mask of one attention over a grid (h, w), as the schedule has it; at first the narrowest."""

    def __init__(self, config: LocalityConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.width: Tensor
        # Saved with the weights: a model that is half trained sees as far as it has learned.
        self.register_buffer("width", torch.tensor(config.width(0.0)))
        self._set: int | None = config.width(0.0)

    def before_step(self, progress: float) -> None:
        """Take the width of that share of the training in [0, 1]."""
        width = self.config.width(progress)
        self._set = ANY if width is None else width
        self.width.fill_(self._set)

    def mask(self) -> Tensor | None:
        """(N, N) bool, True where row i attends to column j; None where all do."""
        # In training the width is known here, and no device has to be asked.
        width = self._set if self.training and self._set is not None else int(self.width)
        if width == ANY:
            return None
        return local_mask(self.grid, width, self.config.mode, self.width.device)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._set = None
        super()._load_from_state_dict(*args, **kwargs)


def local_mask(
    grid: tuple[int, int],
    width: int,
    mode: Literal["raster", "window"],
    device: torch.device | str = "cpu",
) -> Tensor:
    """(N, N) bool over the cells of a grid (h, w) in raster order: True where they are near enough."""
    cells = torch.arange(grid[0] * grid[1], device=device)
    if mode == "raster":
        return (cells[:, None] - cells[None, :]).abs() <= width
    places = torch.stack((cells // grid[1], cells % grid[1]), dim=1)
    steps = (rearrange(places, "i two -> i 1 two") - rearrange(places, "j two -> 1 j two")).abs()
    return steps.amax(2) <= width
