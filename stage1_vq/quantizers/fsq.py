"""Finite scalar quantisation (Mentzer et al. 2023, arXiv:2309.15505): each coordinate is rounded.

Axes: N latents, D coordinates.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stage1_vq.quantizers.base import LARGEST_FIXED_CODEBOOK, QuantizedRows, Quantizer
from stage1_vq.quantizers.gradient import pass_gradient
from taming.config import Config

SLACK = 1e-3
"""How far the bounded range reaches beyond its outermost levels, which tanh would never quite meet."""


class FSQConfig(Config):
    """A grid of prod(levels) codes, without a table and without a loss."""

    kind: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=3)], ...] = Field(default=(8, 8, 8, 5, 5, 5), min_length=1)
    """Values of each coordinate; the paper's for about 2^8, 2^10, 2^12, 2^14, 2^16 codes are 8,6,5; 8,5,5,5;
    7,5,5,5,5; 8,8,8,6,5; 8,8,8,5,5,5."""

    @model_validator(mode="after")
    def _fits(self) -> FSQConfig:
        if self.codebook_size > LARGEST_FIXED_CODEBOOK:
            raise ValueError(
                f"levels {'x'.join(map(str, self.levels))} make {self.codebook_size} codes; "
                f"at most {LARGEST_FIXED_CODEBOOK} are allowed: use fewer or smaller levels"
            )
        return self

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def code_dim(self) -> int:
        return len(self.levels)


class FSQQuantizer(Quantizer):
    """Coordinate i becomes one of levels[i] values, evenly spaced in [-1, 1] (an even number leaves out 1).

    round(tanh(z + s) (L - 1) (1 + slack) / 2 - o) / floor(L / 2), o = 1/2 for even L and else 0, and s such
    that z = 0 lies at 0. The paper's listing takes the slack off and has a tangent for s. An index counts
    with the first coordinate fastest.
    """

    levels: Tensor
    places: Tensor

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config.codebook_size, config.code_dim)
        self.config = config
        places = [math.prod(config.levels[:i]) for i in range(len(config.levels))]
        self.register_buffer("levels", torch.tensor(config.levels))
        self.register_buffer("places", torch.tensor(places))

    @property
    def codebook(self) -> Tensor:
        return self.codes_at(torch.arange(self.codebook_size, device=self.places.device))

    def choose(self, rows: Tensor) -> Tensor:
        digits = self._bounded(rows).round().long() + self.levels // 2
        return (digits * self.places).sum(1)

    def codes_at(self, indices: Tensor) -> Tensor:
        half = self.levels // 2
        digits = indices[..., None] // self.places % self.levels
        return (digits - half) / half

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        indices = self.choose(rows.detach())
        bounded = self._bounded(rows) / (self.levels // 2)
        quantized = pass_gradient(bounded, self.codes_at(indices), "straight_through")
        return QuantizedRows(quantized, indices, rows.new_zeros(()))

    def _bounded(self, rows: Tensor) -> Tensor:
        half = (self.levels - 1) * (1 + SLACK) / 2
        offset = (self.levels + 1) % 2 / 2
        return torch.tanh(rows + torch.atanh(offset / half)) * half - offset
