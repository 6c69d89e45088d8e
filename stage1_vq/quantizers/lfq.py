"""Lookup-free quantisation (Yu et al. 2023, arXiv:2310.05737): a code is the signs of its latent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stage1_vq.quantizers.binary import BinaryConfig, BinaryQuantizer


class LFQConfig(BinaryConfig):
    """2^num_bits codes in {-1, 1}^num_bits, without a table."""

    kind: Literal["lfq"] = "lfq"
    entropy_group_bits: int = Field(default=18, ge=1, le=18)
    """Bits whose joint distribution over the batch is made; the default is exactly that of all codes."""


class LFQQuantizer(BinaryQuantizer):
    """loss = commitment_weight |z - sg(q)|^2 + entropy_weight (E[H(p)] - diversity H(E[p]))."""

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config, magnitude=1.0)
