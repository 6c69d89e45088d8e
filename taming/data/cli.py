"""Find bad files before training does; make data to try the toolkit with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taming.options import DataOverride

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    # Without a callback, typer would make a single command the group itself.
    pass


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    num: Annotated[int, typer.Option(min=1, max=999_999, help="How many scenes.")] = 1000,
    size: Annotated[str, typer.Option(help="Pixels: 64, or HxW as in 64x256.")] = "64",
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other scenes.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace the scenes of an earlier run.")] = False,
) -> None:
    """Write the built-in scenes: pictures with label maps, depth, classes, boxes and sentences."""
    from rich.console import Console
    from rich.progress import track

    from taming.data.export import write_scenes
    from taming.errors import UserError
    from taming.options import parse_size

    frame = parse_size(size)
    if min(frame) < 16 or max(frame) > 4096:
        raise UserError(f"--size {size} is outside of 16 to 4096 pixels; write --size 64 or --size 64x256")
    console = Console(stderr=True)
    written = write_scenes(out, num, size=frame, seed=seed, overwrite=overwrite)
    for _ in track(written, "scenes", total=num, console=console, disable=not console.is_terminal):
        pass
    typer.echo(f"{num} scenes of {frame[0]}x{frame[1]} (height x width) in {out}")
    typer.echo(
        f"train on them with: -o data.root={out} -o data.segmentation=segmentation"
        f" -o data.num_labels={_num_labels()}, or -o data.objects=objects.json, or -o data.text=captions"
    )


@app.command()
def check(
    data: Annotated[
        str, typer.Argument(help="A folder of pictures, a pack of shards, a training config, or codes.")
    ],
    override: DataOverride = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
    full: Annotated[
        bool, typer.Option("--full/--headers", help="Decode every file, or read only the headers.")
    ] = True,
    report: Annotated[Path | None, typer.Option(help="Write the findings there as JSON too.")] = None,
) -> None:
    """List every file that training could not use, and duplicates. Exit code 1 where there are any."""
    import json
    from collections import Counter

    from taming.data.check import check_source
    from taming.options import printable, progress_bar

    checked = 0
    found = []
    with progress_bar("checked") as show:

        def advance(done: int, total: int) -> None:
            nonlocal checked
            checked = done
            show(done, total)

        for finding in check_source(data, override or (), workers=workers, decode=full, progress=advance):
            found.append(finding)
            typer.echo(printable(f"{finding.reason}: {finding.detail}"))
    counts = Counter(finding.reason for finding in found)
    if report is not None:
        document = {
            "data": data,
            "decoded": full,
            "checked": checked,
            "counts": dict(counts),
            "findings": [
                {
                    "path": str(finding.path),
                    "reason": finding.reason,
                    "detail": finding.detail,
                    "others": [str(path) for path in finding.others],
                }
                for finding in found
            ],
        }
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    told = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    typer.echo(f"{checked} checked: {told or 'nothing wrong'}")
    if found:
        raise typer.Exit(1)


def _num_labels() -> int:
    from taming.data.scenes import LABEL_NAMES

    return len(LABEL_NAMES)
