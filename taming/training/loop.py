"""The training loop of every stage: seed, step, log, evaluate, save, stop.

What is trained is a `Task`; this file knows nothing of it. Progress counts pictures as well as steps.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from taming.config import Config, save_config
from taming.data.batch import to_device, validate_batch
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches, train_batches
from taming.errors import ArtifactError, UserError
from taming.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_checkpoints_after,
    save_checkpoint,
)
from taming.training.config import TrainingConfig
from taming.training.distributed import any_process, make_accelerator
from taming.training.guard import CollapseGuard
from taming.training.task import Task
from taming.training.tracking import Tracker

# Keys of a config that may change between a run and its resumption: they do not change what is learned
# from the steps already made.
FREE_KEYS = (
    "description",
    "training.output",
    "training.steps",
    "training.minutes",
    "training.workers",
    "training.log_every",
    "training.evaluate_every",
    "training.preview_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.evaluation_pictures",
    "recompute",
    "compile",
)


class Interrupted(Exception):
    """The run was told to stop, and saved itself. `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; go on from {checkpoint} with --resume auto"
        )
        self.exit_code = 128 + number


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
    checkpoint = _choose_checkpoint(run, resume)
    if checkpoint is not None:
        _check_same_config(checkpoint.parents[1], config)
    accelerator = make_accelerator(training.precision)
    _check_batches(training, accelerator)
    set_seed(training.seed)
    task = build_task()
    task.prepare(accelerator, training.steps)
    set_seed(training.seed, device_specific=True)  # dropout differs between processes from here on
    step, pictures = 0, 0
    if checkpoint is not None:
        progress = load_checkpoint(accelerator, checkpoint, task.modules(), task.optimizers())
        step, pictures = progress["step"], progress["pictures"]
        if progress["data"] != train_data.fingerprint():
            raise UserError(
                f"the training data is not that of {checkpoint}: files came, went or changed; restore them, "
                "or train in another training.output"
            )
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        save_config(config, run / "config.yaml")
    loop = _Loop(accelerator, task, training, train_data, validation_data, run)
    with Tracker(run, training.steps, enabled=accelerator.is_main_process) as tracker, _signals() as signals:
        if checkpoint is not None:
            tracker.note(f"resumed from {checkpoint} at step {step}")
        else:
            for note in train_data.notes:
                tracker.note(note)
        figures = loop.go(tracker, signals, step, pictures)
    accelerator.end_training()
    return RunResult(run, run / "model", figures, training.steps, tuple(loop.notes))


@dataclass
class _Loop:
    accelerator: Accelerator
    task: Task
    training: TrainingConfig
    train_data: PictureDataset
    validation_data: PictureDataset
    run: Path
    notes: list[str] = field(default_factory=list)

    def go(self, tracker: Tracker, signals: list[int], step: int, pictures: int) -> dict[str, float]:
        training, accelerator = self.training, self.accelerator
        tracker.start(step, pictures)
        sums, count, figures = _Sums(), 0, dict[str, float]()
        batches = self._batches(step)
        guard = self.task.guard
        while step < training.steps:
            if guard is not None and guard.needs_checkpoint(step):
                guard.arm(step)
                with tracker.pause():
                    self._save(step, pictures, model=False)
            micro_batches = [to_device(batch, accelerator.device) for batch in next(batches)]
            if count == 0:
                validate_batch(micro_batches[0], self.train_data.provides)
            logs = self.task.train_step(micro_batches, step)
            if guard is not None and guard.collapse is not None:
                step, pictures = self._go_back(tracker, guard, step, pictures)
                batches, sums = self._batches(step), _Sums()
                continue
            sums.add(logs)
            step, pictures, count = step + 1, pictures + training.batch_size, count + 1
            tracker.advance(step)
            for text in self.task.notes():
                self._tell(tracker, step, pictures, text)
            last = step == training.steps
            if step % training.log_every == 0 or last:
                tracker.log(step, pictures, sums.means())
                sums = _Sums()
            stop = any_process(accelerator, bool(signals))
            if (step % training.preview_every == 0 or last) and accelerator.is_main_process:
                with tracker.pause():
                    tracker.picture(step, self._preview())
            if step % training.evaluate_every == 0 or last:
                with tracker.pause():
                    figures = self.task.evaluate(self._validation())
                    tracker.log(step, pictures, figures, kind="validation")
                for text in self.task.notes():
                    self._tell(tracker, step, pictures, text)
            if step % training.checkpoint_every == 0 or last or stop:
                with tracker.pause():
                    folder = self._save(step, pictures)
                if stop and not last:
                    raise Interrupted(signals[0] if signals else signal.SIGTERM, folder)
        if not figures:  # resumed at the end: nothing was left to train, but perhaps to save
            figures = self.task.evaluate(self._validation())
            self._save_model()
        accelerator.wait_for_everyone()
        return figures

    def _go_back(self, tracker: Tracker, guard: CollapseGuard, step: int, pictures: int) -> tuple[int, int]:
        """Return to the last healthy state, with less of what ruined this one; (step, pictures) there."""
        root, reason = self.run / "checkpoints", guard.collapse
        folder = latest_checkpoint(root, up_to=guard.healthy_step)
        noticed = step + 1, pictures + self.training.batch_size
        if folder is None:
            step, pictures = noticed
            guard.rolled_back(step)
            action = "no healthy checkpoint is left, so the run goes on from here"
        else:
            with tracker.pause():
                known = guard.state_dict()
                modules, optimizers = self.task.modules(), self.task.optimizers()
                progress = load_checkpoint(self.accelerator, folder, modules, optimizers)
                guard.load_state_dict(known)  # the guard alone does not forget
                step, pictures = progress["step"], progress["pictures"]
                guard.rolled_back(step)
                # In this order: a run that is killed here meets the collapse again, and never resumes in it.
                if self.accelerator.is_main_process:
                    remove_checkpoints_after(root, step)
                self.accelerator.wait_for_everyone()
                self._save(step, pictures)
            tracker.start(step, pictures)
            action = f"went back to step {step}"
        again = f"has {guard.scale:.2g} of its weight from step {guard.resumed_step} on"
        text = (
            f"the reconstruction collapsed: {reason}; {action}, rollback {guard.rollbacks} of at most "
            f"{guard.config.max_rollbacks}; the adversarial term {again if guard.active else 'is off now'}"
        )
        self._tell(tracker, *noticed, text)
        return step, pictures

    def _tell(self, tracker: Tracker, step: int, pictures: int, text: str) -> None:
        tracker.event(step, pictures, text)
        self.notes.append(f"step {step}: {text}")

    def _batches(self, step: int) -> Iterator[list[Any]]:
        return train_batches(
            self.train_data,
            batch_size=self.training.batch_size,
            micro_batches=self.training.accumulation,
            seed=self.training.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=step,
            workers=self.training.workers,
        )

    def _save(self, step: int, pictures: int, *, model: bool = True) -> Path:
        guard = self.task.guard
        progress = {"pictures": pictures, "data": self.train_data.fingerprint()}
        folder = save_checkpoint(
            self.accelerator,
            self.run / "checkpoints",
            step,
            self.task.modules(),
            self.task.optimizers(),
            progress,
            keep=self.training.keep_checkpoints,
            healthy_step=guard.healthy_step if guard is not None and guard.active else -1,
        )
        if model:
            self._save_model()
        return folder

    def _save_model(self) -> None:
        if self.accelerator.is_main_process:
            self.task.save_model(self.run / "model")

    def _validation(self) -> Iterator[Any]:
        batches = evaluation_batches(
            self.validation_data,
            batch_size=max(self.training.batch_size // self.training.accumulation, 1),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            limit=self.training.evaluation_pictures,
            workers=self.training.workers,
        )
        return (to_device(batch, self.accelerator.device) for batch in batches)

    def _preview(self) -> Tensor:
        batch = next(evaluation_batches(self.validation_data, batch_size=8, limit=8))
        return self.task.preview(to_device(batch, self.accelerator.device))


class _Sums:
    """Means of the logged values, kept on the device until they are read."""

    def __init__(self) -> None:
        self.values: dict[str, list[Tensor]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(float(v) for v in values) / len(values) for name, values in self.values.items()}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker, say): signals are not ours to take
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _choose_checkpoint(run: Path, resume: str) -> Path | None:
    existing = list_checkpoints(run / "checkpoints")
    if resume == "never":
        if existing:
            raise UserError(
                f"{run} already holds a run (newest: {existing[-1].name}) and --resume is never; choose "
                "another training.output, remove the folder, or use --resume auto"
            )
        return None
    if resume == "auto":
        newest = latest_checkpoint(run / "checkpoints")
        if newest is None and existing:
            raise ArtifactError(
                f"all {len(existing)} checkpoints of {run} are damaged; remove the folder to start anew"
            )
        return newest
    path = Path(resume)
    if not path.is_dir():
        raise UserError(
            f"--resume {resume}: no such checkpoint folder; use auto, never or RUN/checkpoints/step-N"
        )
    if list_checkpoints(path / "checkpoints"):  # a run's folder was given
        return latest_checkpoint(path / "checkpoints")
    return path


def _check_same_config(run: Path, config: Config) -> None:
    """Refuse to go on with a config that would have trained otherwise; show the difference."""
    saved_file = run / "config.yaml"
    if not saved_file.is_file():
        return
    saved = _flatten(yaml.safe_load(saved_file.read_text(encoding="utf-8")))
    now = _flatten(config.model_dump(mode="json"))
    changed = [
        f"{key}: {saved.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
        and not any(key == free or key.startswith(free) for free in FREE_KEYS)
    ]
    if changed:
        raise UserError(
            f"the config is not the one {run} was trained with ({'; '.join(changed[:6])}); use {saved_file}, "
            "or train in another training.output"
        )


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _check_batches(training: TrainingConfig, accelerator: Accelerator) -> None:
    processes, accumulation = accelerator.num_processes, training.accumulation
    if training.batch_size % (processes * accumulation):
        valid = [n for n in range(1, 65) if training.batch_size % (n * accumulation) == 0]
        raise UserError(
            f"training.batch_size {training.batch_size} does not divide over {processes} processes with "
            f"accumulation {accumulation}; use a number of processes among {', '.join(map(str, valid))} "
            f"or a batch_size divisible by {processes * accumulation}"
        )
