"""Codes whose digits are signs: what LFQ and BSQ share.

Axes: N latents, L bits (the code's width), K = 2^L codes.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stage1_vq.quantizers.base import QuantizedRows, Quantizer
from stage1_vq.quantizers.entropy import bit_entropies
from stage1_vq.quantizers.gradient import attraction, pass_gradient
from taming.config import Config


class BinaryConfig(Config):
    """A codebook of all patterns of `num_bits` signs."""

    num_bits: int = Field(default=14, ge=2, le=18)
    """Width of the latents; there are 2^num_bits codes."""
    commitment_weight: float = Field(default=0.25, ge=0)
    """Weight of |z - sg(q)|^2."""
    entropy_weight: float = Field(default=0.1, ge=0)
    """Weight of (a cell's entropy - diversity * the batch's entropy), in nats."""
    diversity: float = Field(default=1.0, ge=0)
    entropy_temperature: float = Field(default=1.0, gt=0)
    """The entropies are those of p(c) ~ exp(-|z - c|^2 / temperature)."""
    entropy_group_bits: int = Field(default=9, ge=1, le=18)
    """Bits whose joint distribution over the batch is made; num_bits or more: exactly that of all codes."""

    @property
    def codebook_size(self) -> int:
        return int(2**self.num_bits)

    @property
    def code_dim(self) -> int:
        return self.num_bits


class BinaryQuantizer(Quantizer):
    """Each latent becomes its signs times `magnitude`; the first bit of an index is its highest.

    Subclasses say where the latents live (`compared`).
    """

    places: Tensor

    def __init__(self, config: BinaryConfig, magnitude: float) -> None:
        super().__init__(config.codebook_size, config.num_bits)
        self.config = config
        self.magnitude = magnitude
        self.register_buffer("places", 2 ** torch.arange(config.num_bits - 1, -1, -1))

    @property
    def codebook(self) -> Tensor:
        return self.codes_at(torch.arange(self.codebook_size, device=self.places.device))

    def compared(self, rows: Tensor) -> Tensor:
        """Latents (N, L) where their signs are taken."""
        return rows

    def choose(self, rows: Tensor) -> Tensor:
        return ((rows > 0) * self.places).sum(1)

    def codes_at(self, indices: Tensor) -> Tensor:
        ones = (indices[..., None] & self.places) != 0
        return (2 * ones - 1) * self.magnitude

    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        rows, config = self.compared(rows), self.config
        indices = self.choose(rows)
        codes = self.codes_at(indices)
        loss, terms = attraction(rows, codes, config.commitment_weight, 0.0)
        if config.entropy_weight:
            # |z - 1 m|^2 and |z + 1 m|^2 differ by 4 z m in each bit.
            logits = rows * (4 * self.magnitude / config.entropy_temperature)
            each, batch = bit_entropies(logits, config.entropy_group_bits, training=self.training)
            loss = loss + config.entropy_weight * (each - config.diversity * batch)
            terms |= {"cell_entropy": each.detach(), "batch_entropy": batch.detach()}
        return QuantizedRows(pass_gradient(rows, codes, "straight_through"), indices, loss, terms)
