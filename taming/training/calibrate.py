"""How long a training step takes on this machine."""

from __future__ import annotations

import time
from statistics import median

from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import train_batches
from taming.training.config import TrainingConfig
from taming.training.distributed import make_accelerator
from taming.training.task import Task


def seconds_per_step(
    task: Task, training: TrainingConfig, data: PictureDataset, *, step: int = 0, steps: int = 8
) -> float:
    """Median time of a few real steps of `task` from `step` on; the task is used up by it."""
    accelerator = make_accelerator(training.precision)
    task.prepare(accelerator, training.steps)
    batches = train_batches(
        data, batch_size=training.batch_size, micro_batches=training.accumulation, seed=training.seed
    )
    times = []
    for number in range(steps + 2):
        micro_batches = [to_device(batch, accelerator.device) for batch in next(batches)]
        begin = time.perf_counter()
        logs = task.train_step(micro_batches, step + number)
        _ = [float(value) for value in logs.values()]  # waits for the device
        times.append(time.perf_counter() - begin)
    return median(times[2:])
