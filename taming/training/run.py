"""A run of any stage: what must hold before it starts, and what is built for it.

The steps themselves are `loop.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from taming.config import Config, save_config
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.training.agreement import Agreement
from taming.training.config import TrainingConfig
from taming.training.disk import check_disk
from taming.training.distributed import launch_notes, make_accelerator
from taming.training.loop import Loop
from taming.training.lost import Roster
from taming.training.resume import check_same_config, choose_checkpoint, run_lock
from taming.training.signals import Signals
from taming.training.task import Task
from taming.training.tracking import Tracker


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    folder: Path
    model: Path
    """The saved model: what `from_pretrained` loads."""
    figures: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""
    steps: int = 0
    notes: tuple[str, ...] = ()
    """What happened on the way that the user should know, since the run was started or resumed."""


def run_training(
    build_task: Callable[[], Task],
    config: Config,
    training: TrainingConfig,
    train_data: PictureDataset,
    validation_data: PictureDataset,
    *,
    run: Path,
    resume: str = "auto",
) -> RunResult:
    """Train what `build_task` makes for `training.steps` steps in the folder `run`.

    The task is built after seeding, so that every process starts from the same weights.
    `config` is the whole config, saved as run/config.yaml; `resume` is "auto" (go on from the newest whole
    checkpoint of `run`, if any), "never", or a checkpoint's path.
    Raises UserError where the run cannot start, Interrupted after a signal.
    """
    passed_over: list[str] = []
    checkpoint = choose_checkpoint(run, resume, passed_over)
    if checkpoint is not None:
        check_same_config(checkpoint.parents[1], config)
    accelerator = make_accelerator(training.precision)
    _check_batches(training, accelerator)
    main, agreement, roster = accelerator.is_main_process, Agreement(), Roster()
    data = train_data.fingerprint()  # once: what the run was opened with, whatever becomes of the files
    _check_agreed(agreement, f"{len(train_data)} pictures ({data[:12]})", checkpoint)
    with _machine_faults(roster, accelerator.device):
        set_seed(training.seed)
        task = build_task()
        task.prepare(accelerator, training.steps)
        set_seed(training.seed, device_specific=True)  # dropout differs between processes from here on
        keep = training.keep_checkpoints + (task.guard is not None)
        agreement.together(lambda: check_disk(run, task.modules(), task.optimizers(), keep))
        with (
            _one_run_a_folder(agreement, run, main),
            Tracker(run, training.steps, enabled=main) as tracker,
            Signals() as signals,
        ):
            loop = Loop(
                accelerator,
                agreement,
                task,
                training,
                train_data,
                data,
                validation_data,
                run,
                tracker,
                signals,
            )
            for note in (*launch_notes(training.precision), *passed_over):
                tracker.note(note)
            if checkpoint is not None:
                loop.resume(checkpoint)
            else:
                tracker.cut_back(0, 0)  # what a run said that ended before its first checkpoint
                for note in train_data.notes:
                    tracker.note(note)
            if main:
                save_config(config, run / "config.yaml")
            figures = loop.go()
    accelerator.end_training()
    return RunResult(run, run / "model", figures, training.steps, tuple(loop.notes))


def _check_agreed(agreement: Agreement, data: str, checkpoint: Path | None) -> None:
    """Refuse to start where processes see other data, or would go on from other checkpoints."""
    seen = agreement.equal(data)
    if seen is not None:
        shown = "; ".join(f"process {rank}: {text}" for rank, text in enumerate(seen))
        raise UserError(
            f"the processes see different training data ({shown}); give every one the same files under "
            "data.root"
        )
    found = agreement.equal(str(checkpoint))
    if found is not None:
        raise UserError(
            f"the processes would go on from different checkpoints ({'; '.join(found)}); training.output "
            "must be a folder that all of them see"
        )


@contextmanager
def _one_run_a_folder(agreement: Agreement, run: Path, main: bool) -> Iterator[None]:
    """Hold the run's folder; where another run holds it, every process raises UserError."""
    lock = run_lock(run, enabled=main)
    agreement.together(lock.__enter__)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def _machine_faults(roster: Roster, device: torch.device) -> Iterator[None]:
    """Turn what is known to come of a failing machine into a FaultError that says so."""
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, OSError, MemoryError) as error:
        known = roster.explain(error, device)
        if known is None:
            raise
        raise known from error


def _check_batches(training: TrainingConfig, accelerator: Accelerator) -> None:
    processes, accumulation = accelerator.num_processes, training.accumulation
    if training.batch_size % (processes * accumulation):
        valid = [n for n in range(1, 65) if training.batch_size % (n * accumulation) == 0]
        raise UserError(
            f"training.batch_size {training.batch_size} does not divide over {processes} processes with "
            f"accumulation {accumulation}; use a number of processes among {', '.join(map(str, valid))} "
            f"or a batch_size divisible by {processes * accumulation}"
        )
