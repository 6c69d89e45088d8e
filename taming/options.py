"""What the commands of all groups share: sizes, progress. Light to import: help must stay quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from taming.errors import UserError


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) pixels of "64" or "HxW". Raises UserError."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"size {text!r} is neither a number nor HxW; write 64, or 64x256 (height x width)")
    return int(parts[0]), int(parts[-1])


def empty_folder(path: Path) -> Path:
    """Make `path` for results. Raises UserError where something is in it already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; give --out another one or empty it")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; the function yielded takes (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(title), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
