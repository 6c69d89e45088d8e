"""Versions, devices, disk, data and weights: what would fail, said first."""

import typer

app = typer.Typer()


@app.command()
def doctor() -> None:
    """Say what would fail."""
