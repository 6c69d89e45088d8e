"""Binary spherical quantisation (Zhao et al. 2024, arXiv:2406.07548): LFQ on the unit sphere."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from stage1_vq.quantizers.binary import BinaryConfig, BinaryQuantizer


class BSQConfig(BinaryConfig):
    """2^num_bits codes in {-1, 1}^num_bits / sqrt(num_bits), without a table."""

    kind: Literal["bsq"] = "bsq"


class BSQQuantizer(BinaryQuantizer):
    """Latents are brought to length one, so that the error of a cell is bounded; losses as LFQ's."""

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config, magnitude=config.num_bits**-0.5)

    def compared(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=1)
