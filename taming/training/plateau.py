"""Notices that an error has stopped falling."""

from __future__ import annotations

from pydantic import Field

from taming.config import Config
from taming.training.host_state import HostState


class PlateauConfig(Config):
    """When an error counts as level."""

    window: int = Field(default=200, ge=1)
    """Steps whose mean is compared with that of as many steps before."""
    share: float = Field(default=0.02, ge=0, lt=1)
    """Level: the mean fell by less than this share of itself."""


class Plateau(HostState):
    """Watches one figure a step; `reached` is the step from which it counts as level, or -1."""

    saved = ("reached", "total", "number", "previous")

    def __init__(self, config: PlateauConfig) -> None:
        super().__init__()
        self.config = config
        self.reached = -1
        self.total, self.number, self.previous = 0.0, 0, float("inf")

    def observe(self, step: int, error: float) -> bool:
        """Take in the error of `step`, the same on every process; True once, where it has become level."""
        if self.reached >= 0:
            return False
        self.total += error
        self.number += 1
        if self.number < self.config.window:
            return False
        mean = self.total / self.number
        if mean > (1 - self.config.share) * self.previous:
            self.reached = step + 1
        self.total, self.number, self.previous = 0.0, 0, mean
        return self.reached >= 0
