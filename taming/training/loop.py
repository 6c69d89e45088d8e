"""The training loop of every stage: seed, step, log, evaluate, save, stop.

What is trained is a `Task`; this file knows nothing of it. Progress counts pictures as well as steps.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from taming.atomic import whole_folder
from taming.data.batch import to_device, validate_batch
from taming.data.dataset import PictureDataset
from taming.data.loader import TrainBatches, evaluation_batches, train_batches
from taming.disk import room_for
from taming.errors import UserError
from taming.training.agreement import Agreement
from taming.training.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    other_processes,
    remove_checkpoints_after,
    save_checkpoint,
    tidy,
)
from taming.training.config import TrainingConfig
from taming.training.drift import verify_processes
from taming.training.guard import CollapseGuard
from taming.training.resume import check_same_data
from taming.training.signals import Signals
from taming.training.skipped import Skipped
from taming.training.task import Task
from taming.training.tracking import Tracker


class Interrupted(Exception):
    """The run was told to stop, and saved itself. `exit_code` is 128 + the signal's number."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}; go on from {checkpoint} with --resume auto"
        )
        self.exit_code = 128 + number


class _EvaluationStopped(Exception):
    """A signal came while the run evaluated."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Loop:
    """A run, from one step to the next."""

    accelerator: Accelerator
    agreement: Agreement
    task: Task
    training: TrainingConfig
    train_data: PictureDataset
    fingerprint: str
    """Of the training data."""
    validation_data: PictureDataset
    run: Path
    tracker: Tracker
    signals: Signals
    notes: list[str] = field(default_factory=list)

    step: int = 0
    """Steps that are done."""
    pictures: int = 0
    evaluation_due: bool = False
    """Whether the evaluation after the last step is still to be made: a signal cut it off."""
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums, self.skipped, self.checked = _Sums(), Skipped(self.train_data), False

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, as if the run had never stopped."""
        modules, optimizers = self.task.modules(), self.task.optimizers()
        progress = self.agreement.together(
            lambda: load_checkpoint(self.accelerator, checkpoint, modules, optimizers)
        )
        check_same_data(checkpoint, progress["data"], self.fingerprint)
        self.step, self.pictures = progress["step"], progress["pictures"]
        # Checkpoints of earlier versions have none of these.
        self.sums = _Sums(progress.get("sums", {}))
        self.skipped = Skipped(self.train_data, progress.get("skipped", {}))
        self.evaluation_due = progress.get("evaluation_due", False)
        self.figures = progress.get("figures", {})
        self.tracker.note(f"resumed from {checkpoint} at step {self.step}")
        if (text := other_processes(self.accelerator, checkpoint)) is not None:
            self.tracker.note(text)
        if checkpoint.resolve().parents[1] == self.run.resolve():
            if self.accelerator.is_main_process:
                keep = self.training.keep_checkpoints
                tidy(checkpoint.parent, self.step, keep=keep, healthy_step=self._healthy_step())
            if "log_size" in progress:
                self.tracker.cut_back(progress["log_size"], self.step)

    def go(self) -> dict[str, float]:
        """Train from `step` on to the end; the last evaluation's figures. Raises Interrupted, UserError."""
        training, accelerator, tracker = self.training, self.accelerator, self.tracker
        tracker.start(self.step, self.pictures)
        if self.evaluation_due:
            self._after_step()
        ended = self.step >= training.steps
        self.batches = self._open_batches()
        try:
            while self.step < training.steps:
                self._next_step()
        finally:
            self.batches.close()
        if ended:  # resumed at the end: nothing was left to train, but perhaps to save
            if not self.figures:
                self._evaluate()
            self._save_model()
        accelerator.wait_for_everyone()
        return self.figures

    def _next_step(self) -> None:
        """Read, agree, train, and what is due then; after a collapse, go back."""
        guard, training = self.task.guard, self.training
        if guard is not None and guard.needs_checkpoint(self.step):
            guard.arm(self.step)
            with self.tracker.pause():
                self._save(model=False)
        micro_batches, failure = self._read()
        skipped = self.batches.take_skipped()
        stop, skipped = self.agreement.on_step(self.signals.received, failure, skipped)
        if stop:
            self._leave(stop)
        micro_batches = [to_device(batch, self.accelerator.device) for batch in micro_batches]
        if not self.checked:
            validate_batch(micro_batches[0], self.train_data.provides)
            self.checked = True
        logs = self.task.train_step(micro_batches, self.step)
        if guard is not None and guard.collapse is not None:
            self._go_back(guard)
            self.batches.close()
            self.batches = self._open_batches()
            return
        self.sums.add(logs)
        self.figures = {}
        self.step, self.pictures = self.step + 1, self.pictures + training.batch_size
        self.tracker.advance(self.step)
        text = self.skipped.add(skipped, self.pictures, self.batches.examples)
        for note in (*self.task.notes(), *([text] if text else ())):
            self._tell(self.step, self.pictures, note)
        if training.verify_processes_every and self.step % training.verify_processes_every == 0:
            verify_processes(self.task.modules(), self.step)
        self._after_step()

    def _after_step(self) -> None:
        """What is due once `step` steps are done: log, preview, evaluation, checkpoint."""
        training, step, tracker = self.training, self.step, self.tracker
        last = step == training.steps
        if not self.evaluation_due:
            if step % training.log_every == 0 or last:
                tracker.log(step, self.pictures, self.sums.means())
                self.sums = _Sums()
            if (step % training.preview_every == 0 or last) and self.accelerator.is_main_process:
                with tracker.pause(), _own_randomness(self.accelerator.device):
                    tracker.picture(step, self._preview())
        if step % training.evaluate_every == 0 or last:
            self._evaluate()
        if step % training.checkpoint_every == 0 or last:
            with tracker.pause():
                self._save()

    def _evaluate(self) -> None:
        self.evaluation_due = True
        try:
            with self.tracker.pause(), _own_randomness(self.accelerator.device):
                self.figures = self.task.evaluate(self._validation())
        except _EvaluationStopped as stopped:
            self._leave(stopped.number)
        self.evaluation_due = False
        self.tracker.log(self.step, self.pictures, self.figures, kind="validation")
        for text in self.task.notes():
            self._tell(self.step, self.pictures, text)

    def _leave(self, number: int) -> None:
        """Save and end the run, as the signal asks."""
        with self.tracker.pause():
            folder = self._save(model=not self.evaluation_due)
        raise Interrupted(number, folder)

    def _read(self) -> tuple[list[Any], UserError | None]:
        """This process's next micro-batches, or what is wrong with them."""
        begin = time.perf_counter()
        try:
            return next(self.batches), None
        except UserError as error:
            return [], error
        finally:
            self.tracker.waited(time.perf_counter() - begin)

    def _go_back(self, guard: CollapseGuard) -> None:
        """Return to the last healthy state, with less of what ruined this one."""
        root, reason, tracker = self.run / "checkpoints", guard.collapse, self.tracker
        folder = latest_checkpoint(root, up_to=guard.healthy_step)
        noticed = self.step + 1, self.pictures + self.training.batch_size
        self.sums = _Sums()
        if folder is None:
            self.step, self.pictures = noticed
            guard.rolled_back(self.step)
            action = "no healthy checkpoint is left, so the run goes on from here"
        else:
            with tracker.pause():
                known = guard.state_dict()
                modules, optimizers = self.task.modules(), self.task.optimizers()
                progress = load_checkpoint(self.accelerator, folder, modules, optimizers)
                guard.load_state_dict(known)  # the guard alone does not forget
                self.step, self.pictures = progress["step"], progress["pictures"]
                guard.rolled_back(self.step)
                # In this order: a run that is killed here meets the collapse again, and never resumes in it.
                if self.accelerator.is_main_process:
                    remove_checkpoints_after(root, self.step)
                self.accelerator.wait_for_everyone()
            action = f"went back to step {self.step}"
        again = f"has {guard.scale:.2g} of its weight from step {guard.resumed_step} on"
        text = (
            f"the reconstruction collapsed: {reason}; {action}, rollback {guard.rollbacks} of at most "
            f"{guard.config.max_rollbacks}; the adversarial term {again if guard.active else 'is off now'}"
        )
        self._tell(*noticed, text)
        if folder is not None:
            with tracker.pause():
                self._save()  # what was told is part of it
            tracker.start(self.step, self.pictures)

    def _tell(self, step: int, pictures: int, text: str) -> None:
        self.tracker.event(step, pictures, text)
        self.notes.append(f"step {step}: {text}")

    def _open_batches(self) -> TrainBatches:
        return train_batches(
            self.train_data,
            batch_size=self.training.batch_size,
            micro_batches=self.training.accumulation,
            seed=self.training.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            start_step=self.step,
            workers=self.training.workers,
        )

    def _healthy_step(self) -> int:
        """The newest checkpoint up to it is kept, however old; -1: no more than others."""
        guard = self.task.guard
        return guard.healthy_step if guard is not None and guard.active else -1

    def _save(self, *, model: bool = True) -> Path:
        progress = {
            "pictures": self.pictures,
            "data": self.fingerprint,
            "sums": self.sums.state(),
            "skipped": dict(self.skipped.counts),
            "evaluation_due": self.evaluation_due,
            "figures": self.figures,
            "log_size": self.tracker.log_size(),
        }
        folder = save_checkpoint(
            self.accelerator,
            self.run / "checkpoints",
            self.step,
            self.task.modules(),
            self.task.optimizers(),
            progress,
            keep=self.training.keep_checkpoints,
            healthy_step=self._healthy_step(),
            agreement=self.agreement,
        )
        if model:
            self._save_model()
        return folder

    def _save_model(self) -> None:
        def write() -> None:
            if self.accelerator.is_main_process:
                model = self.run / "model"
                with room_for("model", model), whole_folder(model) as folder:
                    self.task.save_model(folder)

        self.agreement.together(write)

    def _validation(self) -> Iterator[Any]:
        batches = evaluation_batches(
            self.validation_data,
            batch_size=self._evaluation_batch_size(),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            limit=self.training.evaluation_pictures,
            workers=self.training.workers,
        )
        share = -(-self._validation_pictures() // self.accelerator.num_processes)
        rounds = -(-share // max(self._evaluation_batch_size() // self.accelerator.num_processes, 1))
        for _ in range(rounds):
            # Every process asks as often, whether or not it has another batch: none may leave alone.
            if number := self.agreement.stop_asked(self.signals.received):
                raise _EvaluationStopped(number)
            batch = next(batches, None)
            if batch is not None:
                yield to_device(batch, self.accelerator.device)

    def _evaluation_batch_size(self) -> int:
        return max(self.training.batch_size // self.training.accumulation, 1)

    def _validation_pictures(self) -> int:
        limit, total = self.training.evaluation_pictures, len(self.validation_data)
        return total if limit is None else min(limit, total)

    def _preview(self) -> Tensor:
        batch = next(evaluation_batches(self.validation_data, batch_size=8, limit=8))
        return self.task.preview(to_device(batch, self.accelerator.device))


class _Sums:
    """Means of the logged values, kept on the device until they are read."""

    def __init__(self, state: dict[str, list[float]] | None = None) -> None:
        self.values: dict[str, list[Tensor | float]] = {
            name: list(values) for name, values in (state or {}).items()
        }

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self.state().items()}

    def state(self) -> dict[str, list[float]]:
        """What JSON can hold of it, exactly."""
        return {name: [float(value) for value in values] for name, values in self.values.items()}


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """What happens inside draws from the generators without moving them for what comes after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
