"""Codes that are moving averages of their latents (van den Oord et al. 2017, arXiv:1711.00937, appendix A.1).

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stage1_vq.quantizers.base import QuantizedRows
from stage1_vq.quantizers.directions import DirectionTableConfig, DirectionTableQuantizer
from stage1_vq.quantizers.gradient import GradientKind, attraction, pass_gradient
from stage1_vq.quantizers.search import nearest_codes
from taming.collective import sum_over_processes


class EMAConfig(DirectionTableConfig):
    """A nearest-code quantizer whose table no optimiser moves."""

    kind: Literal["ema"] = "ema"
    beta: float = Field(default=0.25, ge=0)
    """Weight of the commitment term."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """What the averages keep each step."""
    epsilon: float = Field(default=1e-5, gt=0)
    """Laplace smoothing of the counts."""
    gradient: GradientKind = "straight_through"
    """rotation: the gradient is turned as the latent is turned onto its code (arXiv:2410.06424)."""


class EMAQuantizer(DirectionTableQuantizer):
    """Each latent becomes its nearest code; loss = beta |z - sg(q)|^2, a mean over all elements.

    forward only remembers; once a step `after_step` moves the averages by what all micro-batches of all
    processes chose: n <- decay n + (1 - decay) count, m <- decay m + (1 - decay) sum, e = m / n. A code
    that was not chosen stays where it is; the published module divides by its smoothed count all the same,
    which throws codes that were never chosen far away.
    """

    row_tensors = (
        "embedding.weight",
        "embedding.cluster_size",
        "embedding.embed_avg",
        "steps_unused",
        "choice_rate",
    )

    def __init__(self, config: EMAConfig) -> None:
        super().__init__(config)
        self.config = config
        self.embedding = _AveragedTable(config.codebook_size, config.code_dim)

    @property
    def follows(self) -> bool:
        return True

    def choose(self, rows: Tensor) -> Tensor:
        return nearest_codes(self.compared(rows), self.codebook)

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        rows, codebook = self.compared(rows), self.codebook
        indices = nearest_codes(rows.detach(), codebook)
        codes = F.embedding(indices, codebook)
        if self.training:
            self.observe(rows.detach(), indices)
        loss, terms = attraction(rows, codes, self.config.beta, 0.0)
        return QuantizedRows(pass_gradient(rows, codes, self.config.gradient), indices, loss, terms)

    def place(self, rows: Tensor, codes: Tensor) -> None:
        table = self.embedding
        # As much weight as a code has on average: less would let one latent carry it off.
        share = table.cluster_size.mean().clamp(min=self.config.epsilon)
        table.weight[rows] = codes[rows]
        table.cluster_size[rows] = share
        table.embed_avg[rows] = codes[rows] * share

    def move(self, latents: Tensor, indices: Tensor, counts: Tensor) -> None:
        table, config = self.embedding, self.config
        # In float64 the rounded sum does not show in which order and on how many processes it was made.
        own = torch.zeros_like(table.embed_avg, dtype=torch.float64)
        sums = sum_over_processes(own.index_add_(0, indices, latents.double())).float()
        counts = counts.float()
        table.cluster_size.lerp_(counts, 1 - config.decay)
        table.embed_avg.lerp_(sums, 1 - config.decay)
        total = table.cluster_size.sum()
        smoothed = (
            (table.cluster_size + config.epsilon) / (total + self.codebook_size * config.epsilon) * total
        )
        chosen = (counts > 0)[:, None]
        table.weight.copy_(torch.where(chosen, table.embed_avg / smoothed[:, None], table.weight))


class _AveragedTable(nn.Module):
    """The published names. Buffers, since parameters without gradients stop training on several processes."""

    weight: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        weight = torch.randn(codebook_size, code_dim)
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.ones(codebook_size))
        self.register_buffer("embed_avg", weight.clone())
