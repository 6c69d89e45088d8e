"""The seam between the loop and what it trains.

The loop (`loop.py`) owns *when*: seed, step, log, evaluate, save, stop. A task owns *what*: the models,
their optimisers and one training step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.training.guard import CollapseGuard
from taming.types import Batch


class Task(Protocol):
    """What is trained."""

    @property
    def guard(self) -> CollapseGuard | None:
        """What tells the loop to go back to a healthy state; None where nothing is to be feared."""
        ...

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes, build the optimisers."""
        ...

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of everything from one global batch; returns detached () values for the log."""
        ...

    def notes(self) -> list[str]:
        """What the user should be told since the last call; asked after each step and evaluation."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Figures over this process's share of the validation set, equal on all processes."""
        ...

    def preview(self, batch: Batch) -> Tensor:
        """(C, H, W) in [-1, 1]: a sheet made from fixed inputs, to look at."""
        ...

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        ...

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers by name."""
        ...

    def save_model(self, folder: Path) -> None:
        """Write what users load, the averaged weights where there are any, into the empty `folder`.

        The main process alone is asked. The folder takes the place of the last one once it is whole.
        """
        ...
