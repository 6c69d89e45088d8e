"""Pack pictures as shards; find bad files before training does; make data to try the toolkit with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taming.options import DataOverride

if TYPE_CHECKING:
    from taming.data.shards.pack import Packed

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
def pack(
    source: Annotated[str, typer.Argument(help="A folder of pictures, or a training config that names one.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the shards.")],
    size_per_shard: Annotated[str, typer.Option(help="Bytes that a shard may have: 256M, 1G.")] = "256M",
    samples_per_shard: Annotated[int | None, typer.Option(min=1, help="Samples that it may have.")] = None,
    shuffle: Annotated[
        int | None, typer.Option(min=0, help="Pack in the random order of this seed, not in that of names.")
    ] = None,
    override: DataOverride = None,
) -> None:
    """Pack a folder of pictures, with maps, labels, boxes and captions, as shards (tars) with an index."""
    from taming.data.config import FolderDataConfig
    from taming.data.shards.pack import pack_folder
    from taming.data.source import data_from
    from taming.errors import UserError
    from taming.options import progress_bar
    from taming.units import parse_bytes

    try:
        shard_bytes = parse_bytes(size_per_shard)
    except ValueError as error:
        raise UserError(f"--size-per-shard {error}") from None
    config = data_from(source, size=1, overrides=override or ())
    if not isinstance(config, FolderDataConfig):
        raise UserError(
            f"{source} is data of kind {config.kind}, and a folder of pictures is packed; for the built-in"
            " scenes write one with `taming data scenes`"
        )
    with progress_bar("pack") as report:
        packed = pack_folder(
            config,
            out,
            shard_bytes=shard_bytes,
            shard_samples=samples_per_shard,
            shuffle=shuffle,
            progress=report,
        )
    _show_packed(packed, out)


@app.command("index")
def index_(
    folder: Annotated[Path, typer.Argument(help="A folder of tars in webdataset's layout.")],
    fields: Annotated[
        str | None,
        typer.Option(help="What every sample must have: image,text,...; default: what the first one has."),
    ] = None,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Leave out samples whose files are bad, and count them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a core.")] = None,
) -> None:
    """Check tars that others made, and write the index that makes them shards to train on."""
    from typing import Any

    from taming.data.shards.indexing import index_tars
    from taming.options import progress_bar

    names: Any = None if fields is None else [name.strip() for name in fields.split(",")]
    with progress_bar("index") as report:
        packed = index_tars(folder, fields=names, leave_out=leave_out, workers=workers, progress=report)
    _show_packed(packed, folder)


def _show_packed(packed: Packed, folder: Path) -> None:
    from taming.options import printable
    from taming.units import format_bytes

    index = packed.index
    for note in packed.notes:
        typer.echo(printable(note), err=True)
    shards = f"{len(index.shards)} shard(s), {format_bytes(sum(shard.size for shard in index.shards))}"
    typer.echo(f"{index.count} samples ({', '.join(index.fields)}) in {shards}, in {folder}")
    given = ["" if kind == "label" else f" -o data.{kind}=true" for kind in index.fields if kind != "image"]
    if "label" in index.fields:
        given.append(" -o data.class_labels=true")
    if index.num_labels is not None:
        given.append(f" -o data.num_labels={index.num_labels}")
    typer.echo(f"train on them with: -o data.kind=shards -o data.root={folder}{''.join(given)}")


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

    from taming.data.checking.check import check_source
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
                    "path": finding.path,
                    "reason": finding.reason,
                    "detail": finding.detail,
                    "others": list(finding.others),
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
