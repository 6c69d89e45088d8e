"""The nearest code, learned by gradient (van den Oord et al. 2017, arXiv:1711.00937)."""

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


class NearestConfig(DirectionTableConfig):
    """The published vector quantizer, and options that keep its codes in use."""

    kind: Literal["nearest"] = "nearest"
    beta: float = Field(default=0.25, ge=0)
    beta_on: Literal["commitment", "codebook"] = "commitment"
    """Which term beta weighs: the paper's commitment term |z - sg(q)|^2, or, as the published weights were
    trained, the codebook term |sg(z) - q|^2."""
    loss_weight: float = Field(default=1.0, ge=0)
    gradient: GradientKind = "straight_through"
    """rotation: the gradient is turned as the latent is turned onto its code (arXiv:2410.06424)."""


class NearestQuantizer(DirectionTableQuantizer):
    """Each latent becomes its nearest code.

    loss = loss_weight * (|z - sg(q)|^2 + beta |sg(z) - q|^2), or beta on the first term; means over all
    elements.
    """

    row_tensors = ("embedding.weight", "steps_unused", "choice_rate")

    def __init__(self, config: NearestConfig) -> None:
        super().__init__(config)
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def choose(self, rows: Tensor) -> Tensor:
        return nearest_codes(self.compared(rows), self.codebook)

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        rows, codebook, config = self.compared(rows), self.codebook, self.config
        indices = nearest_codes(rows.detach(), codebook.detach())
        codes = F.embedding(indices, codebook)
        if self.training:
            self.observe(rows.detach(), indices)
        commitment, moving = (config.beta, 1.0) if config.beta_on == "commitment" else (1.0, config.beta)
        weight = config.loss_weight
        loss, terms = attraction(rows, codes, weight * commitment, weight * moving)
        return QuantizedRows(pass_gradient(rows, codes, config.gradient), indices, loss, terms)

    @torch.no_grad()
    def place(self, rows: Tensor, codes: Tensor) -> None:
        self.embedding.weight[rows] = codes[rows]
