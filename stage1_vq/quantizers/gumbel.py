"""Codes drawn by Gumbel-softmax (Jang et al. 2016, arXiv:1611.01144; Ramesh et al. 2021, arXiv:2102.12092).

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_vq.quantizers.base import QuantizedRows, Quantizer
from stage1_vq.quantizers.search import largest_logit
from taming.config import Config


class GumbelConfig(Config):
    """The published f8 model's quantizer."""

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = Field(default=8192, ge=2)
    code_dim: int = Field(default=256, ge=1)
    """Width of the codes and of the latents; the published models have it equal to z_channels."""
    kl_weight: float = Field(default=1e-8, ge=0)
    """Weight of the divergence of a cell's distribution over the codes from the uniform one."""
    hard: bool = True
    """In training give the decoder one code a cell, with the soft mixture's gradient; false: the mixture."""
    temperature_start: float = Field(default=0.9, gt=0)
    temperature_end: float = Field(default=1e-6, gt=0)
    temperature_hold_steps: int = Field(default=0, ge=0)
    """Steps at the start temperature."""
    temperature_steps: int | None = Field(default=None, ge=1)
    """Step at which the end temperature is reached, along a cosine; null: the run's last."""

    @model_validator(mode="after")
    def _falls(self) -> GumbelConfig:
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"temperature_end {self.temperature_end} is above temperature_start "
                f"{self.temperature_start}; the temperature falls"
            )
        if self.temperature_steps is not None and self.temperature_steps <= self.temperature_hold_steps:
            raise ValueError(
                f"temperature_steps {self.temperature_steps} does not lie after the "
                f"{self.temperature_hold_steps} steps of temperature_hold_steps"
            )
        return self

    def temperature(self, step: int, total_steps: int) -> float:
        """Temperature of training step `step`."""
        first, last = self.temperature_hold_steps, self.temperature_steps or total_steps
        progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
        share = (1 + math.cos(math.pi * progress)) / 2
        return self.temperature_end + (self.temperature_start - self.temperature_end) * share


class GumbelQuantizer(Quantizer):
    """A cell's latent gives logits over the codes; training draws from them, encoding takes the largest.

    loss = kl_weight * sum_k p_k log(K p_k), a mean over cells. State names are the published ones; a new
    model starts with the codes themselves as the projection to logits.
    """

    row_tensors = ("proj.weight", "proj.bias", "embed.weight")

    def __init__(self, config: GumbelConfig) -> None:
        super().__init__(config.codebook_size, config.code_dim)
        self.config = config
        self.temperature = config.temperature_start
        self.proj = nn.Conv2d(config.code_dim, config.codebook_size, 1)
        self.embed = nn.Embedding(config.codebook_size, config.code_dim)
        # Logits z.e from the start: unrelated tables, as published, leave most codes idle for long.
        with torch.no_grad():
            self.proj.weight.copy_(self.embed.weight[:, :, None, None])
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    @property
    def codebook(self) -> Tensor:
        return self.embed.weight.float()

    def before_step(self, step: int, total_steps: int) -> None:
        """Set the temperature of this step."""
        self.temperature = self.config.temperature(step, total_steps)

    def choose(self, rows: Tensor) -> Tensor:
        weight, bias = self._projection()
        return largest_logit(rows, weight, bias)

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        logits = F.linear(rows, *self._projection())  # (N, K)
        probabilities = logits.softmax(1)
        # The published guard against log 0.
        divergence = (probabilities * torch.log(probabilities * self.codebook_size + 1e-10)).sum(1).mean()
        terms = {"kl": divergence.detach()}
        loss = self.config.kl_weight * divergence
        if not self.training:
            indices = self.choose(rows.detach())
            return QuantizedRows(self.codes_at(indices), indices, loss, terms)
        drawn = F.gumbel_softmax(logits, tau=self.temperature, hard=self.config.hard)
        return QuantizedRows(
            drawn @ self.codebook,
            drawn.detach().argmax(1),
            loss,
            {**terms, "temperature": rows.new_tensor(self.temperature)},
        )

    def _projection(self) -> tuple[Tensor, Tensor]:
        assert self.proj.bias is not None
        return self.proj.weight[:, :, 0, 0].float(), self.proj.bias.float()
