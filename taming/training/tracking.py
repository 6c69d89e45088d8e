"""Where a run's figures go: JSON lines, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from taming.data.picture import save_png, to_uint8
from taming.disk import NO_ROOM, room_for
from taming.errors import FaultError
from taming.options import printable


class Tracker:
    """Writes RUN/log.jsonl, RUN/tensorboard and RUN/previews, and shows progress.

    On a terminal a live display shows step, time left, pictures a second and the figures of the last log;
    elsewhere each log is one plain line. Only the main process has one that is not silent.
    """

    def __init__(
        self, run: Path, total_steps: int, *, enabled: bool = True, console: Console | None = None
    ) -> None:
        self.run, self.total_steps, self.enabled = run, total_steps, enabled
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._writer: Any = None
        self._last_time = self._start_time = time.perf_counter()
        self._last_pictures = 0
        self._first_step = 0
        self._waited = 0.0

    def __enter__(self) -> Tracker:
        if not self.enabled:
            return self
        (self.run / "previews").mkdir(parents=True, exist_ok=True)
        self._hook = threading.excepthook
        threading.excepthook = _without_full_disk(self._hook)
        self._open_writer()
        self._log = (self.run / "log.jsonl").open("a", encoding="utf-8")
        if self.console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                MofNCompleteColumn(),
                BarColumn(bar_width=40),
                TextColumn("{task.percentage:.0f}%  left"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[rate]}"),
                console=self.console,
            )
            self._task = self._progress.add_task("train", total=self.total_steps, rate="")
            self._live = Live(self._progress, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if not self.enabled:
            return
        try:
            with room_for("log", self.run):
                self._writer.close()
                self._log.close()
        except FaultError:
            if error is None:
                raise
        finally:
            threading.excepthook = self._hook

    def log_size(self) -> int:
        """Bytes of the log so far, which the disk holds when this returns."""
        if not self.enabled:
            return 0
        with room_for("log", self.run):
            self._log.flush()
            os.fsync(self._log.fileno())
        return self._log.tell()

    def cut_back(self, log_size: int, step: int) -> None:
        """Forget what was logged after a checkpoint that had `log_size` and `step`: it will come again."""
        if not self.enabled:
            return
        if self._log.tell() > log_size:
            self._log.truncate(log_size)
        self._writer.close()
        self._open_writer(purge_step=step + 1)

    def waited(self, seconds: float) -> None:
        """So long the training had nothing to do, for want of data."""
        self._waited += seconds

    def start(self, step: int, pictures: int) -> None:
        """Training goes on from here."""
        self._first_step, self._last_pictures, self._waited = step, pictures, 0.0
        self._last_time = self._start_time = time.perf_counter()
        if self._progress is not None:
            self._progress.reset(self._task, completed=step, total=self.total_steps)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def log(self, step: int, pictures: int, figures: dict[str, float], *, kind: str = "train") -> None:
        """Figures after `step` steps and `pictures` pictures."""
        if not self.enabled:
            return
        now = time.perf_counter()
        if kind == "train":
            seconds = max(now - self._last_time, 1e-9)
            pace = (pictures - self._last_pictures) / seconds
            figures = {"pictures_per_second": pace, "data_wait": self._waited / seconds, **figures}
            self._last_time, self._last_pictures, self._waited = now, pictures, 0.0
        record = {"step": step, "pictures": pictures, "kind": kind, **figures}
        with room_for("log", self.run):
            self._log.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
            self._log.flush()
            for name, value in figures.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
        if self._progress is not None and self._live is not None and kind == "train":
            shown_pace = f"{figures.pop('pictures_per_second'):.1f} pictures/s"
            self._progress.update(self._task, completed=step, rate=shown_pace)
            self._live.update(Group(self._progress, _columns(figures)))
        else:
            left = ""
            if kind == "train" and step > self._first_step:
                rate = (now - self._start_time) / (step - self._first_step)
                left = f" eta {_clock(rate * (self.total_steps - step))}"
            self.note(f"{kind} {step}/{self.total_steps}{left}  {shown}")

    def picture(self, step: int, image: Tensor) -> None:
        """Keep a preview sheet (C, H, W) in [-1, 1]."""
        if self.enabled:
            with room_for("preview", self.run / "previews"):
                save_png(image, self.run / "previews" / f"step-{step:08d}.png")
                self._writer.add_image("preview", to_uint8(image), step)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside (an evaluation, a save) out of the rate and the time left."""
        before = time.perf_counter()
        yield
        spent = time.perf_counter() - before
        self._last_time += spent
        self._start_time += spent

    def event(self, step: int, pictures: int, text: str) -> None:
        """Something that the user should know of the run: a line here, and a record of the kind "note"."""
        if not self.enabled:
            return
        record = {"step": step, "pictures": pictures, "kind": "note", "text": text}
        with room_for("log", self.run):
            self._log.write(json.dumps(record) + "\n")
            self._log.flush()
            self._writer.add_text("note", text, step)
        self.note(f"step {step}: {text}")

    def _open_writer(self, purge_step: int | None = None) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # takes a second to import

        self._writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=purge_step)

    def note(self, text: str) -> None:
        """One line for the user."""
        if self.enabled:
            self.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


def _without_full_disk(hook: Callable[[threading.ExceptHookArgs], Any]) -> Callable[..., Any]:
    """TensorBoard writes in a thread: what stopped it there is raised again by the next call, in one line."""

    def quiet(arguments: threading.ExceptHookArgs) -> None:
        error = arguments.exc_value
        if not (isinstance(error, OSError) and error.errno in NO_ROOM):
            hook(arguments)

    return quiet


def _columns(figures: dict[str, float]) -> Columns:
    """Figures in columns of one width, as many as the terminal takes."""
    return Columns([f"[dim]{name}[/] {_short(value)}" for name, value in figures.items()], padding=(0, 3))


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | str) else float(f"{value:.6g}")


def _short(value: float) -> str:
    return f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
