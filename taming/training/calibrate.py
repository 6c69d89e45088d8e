"""How long a training step takes on this machine, and how many fit into a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, Protocol, Self, TypeVar

import torch
import yaml

from taming.collective import from_main_process
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import train_batches
from taming.training.config import TrainingConfig
from taming.training.distributed import make_accelerator
from taming.training.task import Task

FOR_STEPS = 0.9
"""Share of a run's time that its steps may take; evaluations, previews and saving take the rest."""
FEWEST_STEPS = 50


def seconds_per_step(
    task: Task,
    training: TrainingConfig,
    data: PictureDataset,
    *,
    step: int = 0,
    steps: int = 12,
    cycle: int = 1,
) -> float:
    """Time of a real step of `task` from `step` on; the task is used up by it.

    The lower quartile of a few: what else the machine does for a moment should not decide a whole run.
    Where one step does more than another, they repeat after `cycle`, and means over cycles are compared.

    On several processes the main one's figure.
    """
    accelerator = make_accelerator(training.precision)
    task.prepare(accelerator, training.steps)
    batches = train_batches(
        data,
        batch_size=training.batch_size,
        micro_batches=training.accumulation,
        seed=training.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    times = []
    # Two to warm up, and whole cycles: at least four.
    steps = cycle * max(steps // cycle, 4)
    for number in range(steps + 2 * cycle):
        begin = time.perf_counter()
        micro_batches = [to_device(batch, accelerator.device) for batch in next(batches)]
        logs = task.train_step(micro_batches, step + number)
        _ = [float(value) for value in logs.values()]  # waits for the device
        times.append(time.perf_counter() - begin)
    means = [mean(times[begin : begin + cycle]) for begin in range(2 * cycle, len(times), cycle)]
    return float(from_main_process(torch.tensor(quantiles(means)[0], device=accelerator.device)))


class Shortened(Protocol):
    """The config of a run that can be made in fewer steps."""

    @property
    def training(self) -> TrainingConfig: ...

    def shortened(self, steps: int) -> Self: ...


RunConfig = TypeVar("RunConfig", bound=Shortened)


def fitted(config: RunConfig, steps: int | None, seconds: Callable[[], float]) -> RunConfig:
    """`config` with as many steps as fit into training.minutes here, or `steps` where a run has begun.

    `seconds` times a step; it is only called where that decides.
    """
    training = config.training
    if training.minutes is None or training.steps <= FEWEST_STEPS:
        return config
    if steps is None:
        steps = steps_within(FOR_STEPS * 60 * training.minutes, seconds(), training.steps)
    return config.shortened(steps)


def steps_within(seconds: float, seconds_per_step: float, steps: int) -> int:
    """`steps`, or as many as take `seconds`; at least 50."""
    return min(steps, max(int(seconds / seconds_per_step), FEWEST_STEPS))


def steps_of_run(run: Path) -> int | None:
    """The steps that the run in this folder was started for; None where there is none."""
    saved = run / "config.yaml"
    if not saved.is_file():
        return None
    values: Any = yaml.safe_load(saved.read_text(encoding="utf-8"))
    return int(values["training"]["steps"])
