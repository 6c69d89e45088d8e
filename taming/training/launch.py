"""What every `train` command does around the loop: the run's folder, and the dry run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from taming.config import Config, read_yaml, shipped_configs
from taming.options import printable
from taming.training.config import TrainingConfig
from taming.training.loop import Interrupted
from taming.training.run import RunResult


def run_folder(training: TrainingConfig, source: str) -> Path:
    """training.output, or runs/NAME for the config NAME."""
    return training.output or Path("runs") / Path(source).stem


def train_or_describe(
    train: Callable[..., RunResult],
    describe: Callable[[Any], dict[str, str]],
    config: Config,
    training: TrainingConfig,
    source: str,
    *,
    resume: str,
    dry_run: bool,
) -> None:
    """The body of a `train` command: a dry run, or a training that says where its model is.

    After a signal it leaves with the code 128 + the signal's number.
    """
    if dry_run:
        print_dry_run(config, describe(config), Console())
        return
    try:
        result = train(config, run_folder(training, source), resume=resume)
    except Interrupted as interruption:
        if _speaks():
            typer.echo(str(interruption), err=True)
        raise typer.Exit(interruption.exit_code) from None
    if not _speaks():
        return
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.figures.items())
    for note in result.notes:  # again, since they may be far above
        typer.echo(printable(note))
    typer.echo(f"model in {result.model}  {figures}")


def _speaks() -> bool:
    """Whether this is the process of a launcher's that says what all of them would."""
    return os.environ.get("RANK", "0") == "0"


def print_dry_run(config: Config, facts: dict[str, str], console: Console) -> None:
    """The resolved config as YAML, and a table of what it amounts to."""
    console.print(
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True).rstrip(),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name, value)
    console.print()
    console.print(table)


def print_configs(group: str, console: Console) -> None:
    """The shipped configs of a group with a line each."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, path in shipped_configs(group).items():
        table.add_row(name, str(read_yaml(path).get("description", "")))
    console.print(table)
