"""Index backpropagation (Shi et al. 2024, arXiv:2412.02692): every code gets a gradient at every step.

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
from stage1_vq.quantizers.entropy import categorical_entropies
from stage1_vq.quantizers.gradient import attraction
from stage1_vq.quantizers.search import largest_logit


class IBQConfig(DirectionTableConfig):
    """A table whose codes are chosen by their dot product with the latent."""

    kind: Literal["ibq"] = "ibq"
    beta: float = Field(default=0.25, ge=0)
    """Weight of the term that moves the chosen code to its latent."""
    loss_weight: float = Field(default=1.0, ge=0)
    """Weight of the three squared errors."""
    entropy_weight: float = Field(default=0.05, ge=0)
    """Weight of (a cell's entropy - the batch's entropy) over the codes, in nats."""
    entropy_temperature: float = Field(default=0.01, gt=0)
    """The entropies are those of softmax(logits / temperature)."""


class IBQQuantizer(DirectionTableQuantizer):
    """The code with the largest logit z.e, with the gradient of the softmax over all of them.

    q~ = e_k + (p E - sg(p E)), p = softmax(z E^T): the paper's one-hot with a soft gradient, times the table.
    loss = loss_weight (|q~ - z|^2 + |sg(e_k) - z|^2 + beta |e_k - sg(z)|^2) + entropy_weight (E[H] - H[E]).
    Training holds the (N, K) logits, as the method must; encoding does not.
    """

    row_tensors = ("embedding.weight", "steps_unused", "choice_rate")

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config)
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)

    def choose(self, rows: Tensor) -> Tensor:
        return largest_logit(self.compared(rows), self.codebook)

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        rows, codebook, config = self.compared(rows), self.codebook, self.config
        logits = rows @ codebook.T  # (N, K)
        indices = largest_logit(rows, codebook)
        codes = F.embedding(indices, codebook)
        mixture = logits.softmax(1) @ codebook.detach()
        quantized = codes + (mixture - mixture.detach())
        if self.training:
            self.observe(rows.detach(), indices)
        loss, terms = attraction(rows, codes, config.loss_weight, config.loss_weight * config.beta)
        loss = loss + config.loss_weight * F.mse_loss(quantized, rows)
        if config.entropy_weight:
            each, batch = categorical_entropies(logits / config.entropy_temperature, training=self.training)
            loss = loss + config.entropy_weight * (each - batch)
            terms |= {"cell_entropy": each.detach(), "batch_entropy": batch.detach()}
        return QuantizedRows(quantized, indices, loss, terms)

    @torch.no_grad()
    def place(self, rows: Tensor, codes: Tensor) -> None:
        self.embedding.weight[rows] = codes[rows]
