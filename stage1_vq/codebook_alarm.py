"""Tells once a run that most of the codebook lies idle, and what would help."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from taming.config import Config
from taming.training.host_state import HostState

PATIENCE = 3
"""Windows that a codebook has to come alive."""


class CodebookAlarmConfig(Config):
    """When a codebook counts as idle."""

    window: int = Field(default=200, ge=1)
    """Steps over which it is counted which codes were chosen."""
    share: float = Field(default=0.1, gt=0, lt=1)
    """Idle: less than this share was, of the codes or, where those are fewer, of the cells in a window."""


class CodebookAlarm(HostState):
    """Counts the codes that training chooses; once a run `observe` returns a warning.

    `remedies` are the settings that would help with this codebook. The counts stay on the device and are
    read once a window.
    """

    saved = ("number", "best", "windows", "warned")

    def __init__(self, config: CodebookAlarmConfig, codebook_size: int, remedies: list[str]) -> None:
        super().__init__()
        self.config = config
        self.remedies = remedies
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(codebook_size, dtype=torch.int64))
        self.number, self.windows = 0, 0
        self.best = 0.0
        self.warned = False

    def count(self, counts: Tensor) -> None:
        """Add how often each code (K,) was chosen in a step, by all processes."""
        if not self.warned:
            self.counts += counts

    def observe(self) -> str | None:
        """After each step, on every process; the warning, once."""
        self.number += 1
        if self.warned or self.number < self.config.window:
            return None
        counts = self.counts
        used, cells = int((counts > 0).sum()), int(counts.sum())
        self.counts.zero_()
        self.number, self.windows = 0, self.windows + 1
        share = used / max(min(len(counts), cells), 1)
        before, self.best = self.best, max(self.best, share)
        fallen = before >= 2 * self.config.share
        if share >= self.config.share or not (fallen or self.windows >= PATIENCE):
            return None
        self.warned = True
        history = f"after {before:.0%} at best" if fallen else "and never many more"
        return (
            f"the codebook lies idle: {used} of {len(counts)} codes were chosen in {self.config.window} "
            f"steps, {history}; try {', '.join(self.remedies)}"
        )


def remedies(quantizer: Config) -> list[str]:
    """Settings of model.quantizer that wake a codebook, of those that it has and that are not set."""
    found = []
    if getattr(quantizer, "kmeans_init", None) is False:
        found.append("kmeans_init: true")
    if getattr(quantizer, "revive_after", 0) is None:
        found.append("revive_after: 100")
    if getattr(quantizer, "l2_normalised", None) is False:
        found.append("l2_normalised: true")
    if getattr(quantizer, "code_dim", 0) > 16:
        found.append("code_dim: 8")
    if hasattr(quantizer, "entropy_weight"):
        found.append("a larger entropy_weight")
    found.append("fewer levels" if hasattr(quantizer, "levels") else "fewer codes")
    return [f"model.quantizer.{found[0]}", *found[1:]] if ":" in found[0] else found
