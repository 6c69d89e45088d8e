"""Residual quantisation (Lee et al. 2022, arXiv:2203.01941): several codes a cell, folded into one index.

Axes: N latents, D code width, S codes of a stage, K = S^num_stages.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_vq.quantizers.base import LARGEST_FIXED_CODEBOOK, QuantizedRows, Quantizer
from stage1_vq.quantizers.gradient import GradientKind, pass_gradient
from stage1_vq.quantizers.nearest import NearestConfig, NearestQuantizer
from taming.config import Config


class ResidualConfig(Config):
    """A coarse code, then codes for what is left."""

    kind: Literal["residual"] = "residual"
    num_stages: int = Field(default=2, ge=2)
    codes_per_stage: int = Field(default=128, ge=2)
    code_dim: int = Field(default=256, ge=1)
    beta: float = Field(default=0.25, ge=0)
    """Weight of the commitment terms."""
    loss_weight: float = Field(default=1.0, ge=0)
    gradient: GradientKind = "straight_through"
    """rotation: the gradient is turned as the latent is turned onto the sum of its codes."""
    kmeans_init: bool = False
    """Start each stage, once the one before has, from the k-means centres of its first residuals."""
    revive_after: int | None = Field(default=None, ge=1)
    """Replace a stage's code that was not chosen for this many steps by a recent residual; null: never."""

    @model_validator(mode="after")
    def _fits(self) -> ResidualConfig:
        if self.codebook_size > LARGEST_FIXED_CODEBOOK:
            raise ValueError(
                f"{self.num_stages} stages of {self.codes_per_stage} codes fold into "
                f"{self.codebook_size} codes; at most {LARGEST_FIXED_CODEBOOK} are allowed: use "
                "fewer stages or codes_per_stage"
            )
        return self

    @property
    def codebook_size(self) -> int:
        return int(self.codes_per_stage**self.num_stages)

    def stage(self) -> NearestConfig:
        """The quantizer of one stage."""
        return NearestConfig(
            codebook_size=self.codes_per_stage,
            code_dim=self.code_dim,
            beta=self.beta,
            kmeans_init=self.kmeans_init,
            revive_after=self.revive_after,
        )


class ResidualQuantizer(Quantizer):
    """Stage s quantises what the stages before it left; a cell is the sum of its codes.

    index = sum_s i_s S^(num_stages - 1 - s): the coarse code counts most. loss = loss_weight times the mean
    over stages of |r - sg(q)|^2 beta + |sg(r) - q|^2. The gradient passes once from the sum to the latents.
    """

    def __init__(self, config: ResidualConfig) -> None:
        super().__init__(config.codebook_size, config.code_dim)
        self.config = config
        self.stages = nn.ModuleList(NearestQuantizer(config.stage()) for _ in range(config.num_stages))

    @property
    def codebook(self) -> Tensor:
        return self.codes_at(torch.arange(self.codebook_size, device=self._stages()[0].codebook.device))

    def choose(self, rows: Tensor) -> Tensor:
        digits = []
        for stage in self._stages():
            digits.append(stage.choose(rows))
            rows = rows - stage.codes_at(digits[-1])
        return self._fold(digits)

    def codes_at(self, indices: Tensor) -> Tensor:
        size, last = self.config.codes_per_stage, self.config.num_stages - 1
        codes = (
            stage.codes_at(indices // size ** (last - number) % size)
            for number, stage in enumerate(self._stages())
        )
        return sum(codes, start=torch.zeros((), device=indices.device))

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        residual, digits, losses, terms = rows, [], [], {}
        for number, stage in enumerate(self._stages()):
            part = stage.quantize_rows(residual)
            residual = residual - part.quantized.detach()
            digits.append(part.indices)
            losses.append(part.loss)
            terms[f"residual_{number + 1}"] = part.terms["commitment"]
        indices = self._fold(digits)
        quantized = pass_gradient(rows, self.codes_at(indices), self.config.gradient)
        return QuantizedRows(quantized, indices, self.config.loss_weight * torch.stack(losses).mean(), terms)

    def before_step(self, step: int, total_steps: int) -> None:
        for stage in self._stages():
            stage.before_step(step, total_steps)

    def forget_step(self) -> None:
        for stage in self._stages():
            stage.forget_step()

    def after_step(self) -> None:
        """k-means or revival of every stage; a later one waits until the one before has its centres."""
        stages = self._stages()
        for stage in [stage for stage in stages if stage.waits_for_kmeans][1:]:
            stage.forget()
        for stage in stages:
            stage.after_step()

    def _fold(self, digits: list[Tensor]) -> Tensor:
        folded = torch.zeros_like(digits[0])
        for digit in digits:
            folded = folded * self.config.codes_per_stage + digit
        return folded

    def _stages(self) -> list[NearestQuantizer]:
        return [stage for stage in self.stages if isinstance(stage, NearestQuantizer)]
