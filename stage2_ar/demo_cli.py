"""Both stages on the built-in scenes, with a contact sheet to look at: a few minutes on two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs, the sheet and metrics.json.")] = Path(
        "runs/demo"
    ),
    minutes: Annotated[float, typer.Option(min=1, help="A slower machine trains for fewer steps.")] = 7.2,
) -> None:
    from rich.console import Console

    from stage2_ar.demo import run_demo

    run_demo(out, minutes=minutes, console=Console())
