"""A frozen table under one learned linear map (Zhu et al. 2024, arXiv:2411.02038).

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stage1_vq.quantizers.base import QuantizedRows
from stage1_vq.quantizers.gradient import GradientKind, attraction, pass_gradient
from stage1_vq.quantizers.health import TableConfig, TableQuantizer
from stage1_vq.quantizers.search import nearest_codes


class SimVQConfig(TableConfig):
    """Nearest codes that all move together, so that none is left behind."""

    kind: Literal["simvq"] = "simvq"
    beta: float = Field(default=0.25, ge=0)
    """Weight of the commitment term."""
    loss_weight: float = Field(default=1.0, ge=0)
    gradient: GradientKind = "straight_through"
    """rotation: the gradient is turned as the latent is turned onto its code (arXiv:2410.06424)."""


class SimVQQuantizer(TableQuantizer):
    """Code k is W c_k with c_k ~ N(0, 1/D) fixed; loss as the nearest quantizer's, beta on commitment."""

    row_tensors = ("embedding.weight", "steps_unused", "choice_rate")

    def __init__(self, config: SimVQConfig) -> None:
        super().__init__(config)
        self.config = config
        self.embedding = _FrozenTable(config.codebook_size, config.code_dim)
        self.embedding_proj = nn.Linear(config.code_dim, config.code_dim, bias=False)

    @property
    def codebook(self) -> Tensor:
        return F.linear(self.embedding.weight.float(), self.embedding_proj.weight.float())

    def choose(self, rows: Tensor) -> Tensor:
        return nearest_codes(rows, self.codebook)

    def codes_at(self, indices: Tensor) -> Tensor:
        fixed = F.embedding(indices, self.embedding.weight.float())
        return F.linear(fixed, self.embedding_proj.weight.float())

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        config = self.config
        indices = self.choose(rows.detach())
        codes = self.codes_at(indices)
        if self.training:
            self.observe(rows.detach(), indices)
        loss, terms = attraction(rows, codes, config.loss_weight * config.beta, config.loss_weight)
        return QuantizedRows(pass_gradient(rows, codes, config.gradient), indices, loss, terms)

    @torch.no_grad()
    def place(self, rows: Tensor, codes: Tensor) -> None:
        weight = self.embedding_proj.weight
        if rows.all():
            weight.copy_(torch.eye(self.code_dim, device=weight.device))
        self.embedding.weight[rows] = codes[rows] @ torch.linalg.pinv(weight).T


class _FrozenTable(nn.Module):
    """A buffer, since parameters without gradients stop training on several processes."""

    weight: Tensor

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(codebook_size, code_dim) * code_dim**-0.5)
