"""What the commands of all groups share: options, sizes, progress. Light to import: help must stay quick."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from taming.errors import UserError

ConfigName = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped config.")
]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", metavar="A.B=VALUE", help="Set a key of the config.")
]
DataOverride = Annotated[
    list[str] | None, typer.Option("--override", "-o", metavar="KEY=VALUE", help="Set a key of the data.")
]
Resume = Annotated[str, typer.Option(help="auto, never, or a checkpoint's folder.")]
DryRun = Annotated[bool, typer.Option(help="Show the resolved config and its sizes; train nothing.")]
Data = Annotated[
    str,
    typer.Argument(help="A folder of pictures or of shards, an address, a training config, or `scenes`."),
]
Split = Annotated[str, typer.Option(help="all, train or validation.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the fastest there is.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once.")]

Tile = Annotated[
    int | None,
    typer.Option(min=0, help="Work in tiles of so many pixels; 0: never; default: above 512x512, in 256."),
]


def parse_size(text: str) -> tuple[int, int]:
    """(H, W) pixels of "64" or "HxW". Raises UserError."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"size {text!r} is neither a number nor HxW; write 64, or 64x256 (height x width)")
    return int(parts[0]), int(parts[-1])


def check_empty(path: Path) -> None:
    """Raises UserError where something is in the folder for results already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is not an empty folder; give --out another one or empty it")


def empty_folder(path: Path) -> Path:
    """Make `path` for results. Raises UserError where something is in it already."""
    check_empty(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def printable(text: str) -> str:
    """`text` on one line, with escapes for what a terminal would act on: names of files can hold anything.

    Control characters, changes of direction and bytes that are no UTF-8 become backslash escapes.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "replace").decode()
        for character in text
    )


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere; the function yielded takes (done, total)."""
    import sys

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn(title), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn()
    # What is printed meanwhile goes above the bar, but never there from a pipe or a file.
    above = sys.stdout.isatty()
    with Progress(
        *columns, console=console, disable=not console.is_terminal, redirect_stdout=above
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_figures(title: str, figures: Mapping[str, Any], out: Path | None) -> None:
    """A table on the terminal and, where `out` is given, `out`/metrics.json."""
    import json

    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=title, title_justify="left")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
