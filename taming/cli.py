"""The `taming` command.

Groups of commands are found through the entry-point group `taming.commands` and imported only when one of
them is used: this module names no stage, help is quick, and other packages can add a group.
"""

from __future__ import annotations

import ast
import os
import sys
import time
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

LONGEST_ERROR = 4000
SAME_SECONDS = 5.0
"""A process other than the main one waits so long before it says what is wrong."""
_FORMAT_WARNING = warnings.formatwarning


@cache
def _groups() -> dict[str, EntryPoint]:
    return {
        point.name: point for point in sorted(entry_points(group="taming.commands"), key=lambda p: p.name)
    }


def _summary(point: EntryPoint) -> str:
    """First line of a group's module docstring, read from its source: nothing is imported for help."""
    spec = find_spec(point.module)
    if spec is None or not spec.origin:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0]


class _LazyGroup(TyperGroup):
    """A group whose commands are entry points, loaded when they run."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_groups())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that knows the summary: enough for help."""
        point = _groups().get(cmd_name)
        return point and typer.core.TyperCommand(cmd_name, help=_summary(point))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that runs: only now is its module imported."""
        name, found, rest = super().resolve_command(ctx, args)
        if name is None or name not in _groups():
            return name, found, rest
        command = get_command(_groups()[name].load())
        command.name = name
        return name, command, rest


app = typer.Typer(
    cls=_LazyGroup,
    name="taming",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Two-stage image synthesis.

    Train a codebook on your pictures, then a transformer that paints with it.
    """


def _as_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    from taming.errors import DataWarning
    from taming.options import printable

    if issubclass(category, DataWarning):  # it is for users: where in the code it was said does not matter
        return f"warning: {printable(str(message))}\n"
    return _FORMAT_WARNING(message, category, filename, lineno, line)


def main() -> None:
    """Run the command line. A user's mistake is one line on stderr and exit code 2, never a traceback.

    Other exit codes are those of `taming.errors`, and 130 after Ctrl-C.
    """
    from taming.errors import UserError
    from taming.options import printable

    warnings.formatwarning = _as_one_line
    try:
        app()
    except UserError as error:
        # A launcher's processes write to one terminal.
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.everywhere:
            if rank != "0":  # the launcher ends this process where the main one says the same
                time.sleep(SAME_SECONDS)
            told = printable(str(error))
            if len(told) > LONGEST_ERROR:  # a file that a stranger made may hold a name of any length
                told = f"{told[:LONGEST_ERROR]} ... ({len(told)} characters)"
            typer.echo(f"error: {told}" if rank == "0" else f"error in process {rank}: {told}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
