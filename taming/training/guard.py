"""Notices that an adversarial term ruins a reconstruction.

The guard watches figures and says when to go back, and to where; the loop goes back, and the term asks the
guard how much of it is left.
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from taming.config import Config
from taming.training.host_state import HostState

EARLY = {2: (1.05, 1.5), 3: (1.0, 1.2)}
"""Of the second and the third window with the term: times the first window's error, and times the blind one,
that are too much."""
STRETCH, FALLING = 5, 0.95
"""Windows in which an error that is still above the blind one must fall to this share of itself."""
PAUSE = 2
"""Windows without the term after a rollback: the guard's measure of what the reconstruction alone reaches."""


class GuardConfig(Config):
    """When a reconstruction counts as ruined, and what becomes of the term that ruined it."""

    window: int = Field(default=100, ge=1)
    """Steps whose mean error is judged at once."""
    share: float = Field(default=0.5, gt=0)
    """Ruined: a window's error is so much above the best window's (0.5: half as much again)."""
    max_rollbacks: int = Field(default=3, ge=1)
    """With this many, the term is off for the rest of the run."""
    weight_factor: float = Field(default=0.1, gt=0, lt=1)
    """What the term's weight is multiplied by at each rollback."""


class CollapseGuard(HostState):
    """Watches a reconstruction's error while an adversarial term counts.

    `counts` says whether the term counts at a step. Two things are a collapse: a window whose mean error is
    `share` above the best window's; and a reconstruction that was ruined before it had a good window. Of the
    latter, an error that does not fall though it is as high as the blind error (of painting each picture in
    its mean colour) is the sign: any autoencoder that is let learn falls below it soon, and falls until then.
    """

    saved = (
        "total", "blind_total", "number", "best", "reference", "windows",
        "rollbacks", "resumed_step", "healthy_step", "armed", "learned",
    )  # fmt: skip

    def __init__(self, config: GuardConfig, counts: Callable[[int], bool]) -> None:
        super().__init__()
        self.config = config
        self.counts = counts
        self.collapse: str | None = None
        """What the last step showed, for the loop, which then calls `rolled_back`."""
        self.total, self.blind_total, self.number = 0.0, 0.0, 0
        self.best = self.reference = float("inf")
        self.windows = 0
        """Finished ones since the term first counted, none of them a collapse."""
        self.rollbacks = 0
        self.resumed_step = 0
        """The term is at rest before it."""
        self.healthy_step = -1
        """Checkpoints up to it are good."""
        self.armed = False
        self.learned = False

    @property
    def active(self) -> bool:
        """Whether it would still go back."""
        return self.rollbacks < self.config.max_rollbacks

    @property
    def scale(self) -> float:
        """What is left of the term's weight, in [0, 1]."""
        return self.config.weight_factor**self.rollbacks if self.active else 0.0

    @property
    def wants_blind(self) -> bool:
        """Whether it needs the blind error: until the reconstruction has once been better."""
        return not self.learned

    def needs_checkpoint(self, step: int) -> bool:
        """Whether the term is about to count, from a state that has not been saved."""
        return not self.armed and self.active and self.counts(step)

    def arm(self, step: int) -> None:
        """The state before `step` is about to be saved, and is good."""
        self.armed, self.healthy_step = True, step

    def observe(self, step: int, error: float, blind: float, *, last: bool) -> None:
        """Take in the errors of `step`, the same on every process; `last`: no other step follows.

        `blind` may be anything where `wants_blind` was false. Sets `collapse`.
        """
        self.total += error
        self.blind_total += blind
        self.number += 1
        whole = self.number == self.config.window
        # What a run ends with is judged too, if it is enough to judge by. Nothing else comes of it: a run
        # that is prolonged later goes on as if it had never ended.
        if whole or (last and 4 * self.number >= self.config.window):
            self._judge(step, self.total / self.number, self.blind_total / self.number, whole=whole)
        if whole:
            self.total, self.blind_total, self.number = 0.0, 0.0, 0

    def rolled_back(self, step: int) -> None:
        """The loop is at the good state before `step` again; the term rests, then starts anew with less."""
        self.rollbacks += 1
        self.resumed_step = step + PAUSE * self.config.window
        self.healthy_step, self.armed, self.collapse = step, False, None
        self.total, self.blind_total, self.number = 0.0, 0.0, 0
        self.reference, self.windows = float("inf"), 0

    def _judge(self, step: int, error: float, blind: float, *, whole: bool) -> None:
        if self.active and self.counts(step):
            self.collapse = self._what_is_wrong(error, blind)
        if self.collapse is not None or not whole:
            return
        if self.counts(step):
            self.windows += 1
            if self.windows == 1 or self.windows % STRETCH == 0:
                self.reference = error
        self.best = min(self.best, error)
        self.learned = self.learned or error < blind
        if self.learned and error <= (1 + 0.5 * self.config.share) * self.best:
            # This window followed on the state at its start, which is therefore good.
            self.healthy_step = max(self.healthy_step, step + 1 - self.number)

    def _what_is_wrong(self, error: float, blind: float) -> str | None:
        over = f"its mean error over {self.number} steps is {error:.4g}"
        if error > (1 + self.config.share) * self.best:
            return f"{over}, {error / self.best:.2g} times the best window's {self.best:.4g}"
        number = self.windows + 1
        limits = (FALLING, 1.0) if number % STRETCH == 0 else EARLY.get(number)
        if self.learned or limits is None:
            return None
        if error >= limits[0] * self.reference and error >= limits[1] * blind:
            return f"{over}, not falling, and each picture's mean colour alone would give {blind:.4g}"
        return None
