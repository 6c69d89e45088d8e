"""Tables whose codes may be compared by direction alone (Yu et al. 2022, arXiv:2110.04627, 3.2)."""

from __future__ import annotations

from abc import ABC

import torch.nn.functional as F
from torch import Tensor

from stage1_vq.quantizers.health import TableConfig, TableQuantizer


class DirectionTableConfig(TableConfig):
    """A table, and how latents are compared with it."""

    l2_normalised: bool = False
    """Compare directions only: latents and codes of length one."""


class DirectionTableQuantizer(TableQuantizer, ABC):
    """A table `embedding.weight` (K, D), brought to length one with its latents where the config says so."""

    def __init__(self, config: DirectionTableConfig) -> None:
        super().__init__(config)
        self.l2_normalised = config.l2_normalised

    @property
    def codebook(self) -> Tensor:
        weight = self.get_submodule("embedding").weight
        assert isinstance(weight, Tensor)
        return self.compared(weight.float())

    def compared(self, rows: Tensor) -> Tensor:
        """Latents or codes (..., D) as they are compared."""
        return F.normalize(rows, dim=1) if self.l2_normalised else rows
