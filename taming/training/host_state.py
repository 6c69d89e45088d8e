"""Plain numbers that are saved with the weights."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class HostState(nn.Module):
    """A module whose state are the numbers named in `saved`: attributes that decisions are made of.

    They are Python numbers, so that reading them never waits for a device, and appear in the state dict as
    one tensor. A subclass gives each its first value.
    """

    saved: ClassVar[tuple[str, ...]]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([float(getattr(self, name)) for name in self.saved], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        for name, value in zip(self.saved, state.tolist(), strict=True):
            setattr(self, name, type(getattr(self, name))(value))
