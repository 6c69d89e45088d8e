"""`taming ar import`. Registered by stage2_ar.cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taming.errors import UserError
from taming.options import parse_size, printable

PROGRAMS = ("taming-transformers",)


def import_pipeline(
    program: Annotated[str, typer.Argument(metavar="|".join(PROGRAMS), help="Whose model it is.")],
    source: Annotated[Path, typer.Argument(help="Its checkpoint.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the pipeline.")],
    config: Annotated[Path | None, typer.Option(help="The YAML that came with the checkpoint.")] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Pixels that it was trained on: 256, or HxW; default: its tokenizer's resolution."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of a bare transformer: a saved tokenizer of its pictures.")
    ] = None,
    condition_tokenizer: Annotated[
        str | None, typer.Option(help="Of a bare transformer: a saved tokenizer of its condition.")
    ] = None,
) -> None:
    """Make a pipeline of a published transformer. Its pickle is read without running its code."""
    if program not in PROGRAMS:
        raise UserError(f"no importer for {program!r}; there is {', '.join(PROGRAMS)}")
    if condition_tokenizer is not None and tokenizer is None:
        raise UserError("--condition-tokenizer is for a bare transformer; give --tokenizer too")
    frame = None if size is None else parse_size(size)
    from stage1_vq import VQModel
    from stage1_vq.interop.exported import new_folder
    from stage2_ar.interop.taming_transformers import import_transformer

    with new_folder(out):
        imported = import_transformer(
            source,
            config=config,
            size=frame,
            tokenizer=None if tokenizer is None else VQModel.from_pretrained(tokenizer),
            condition_tokenizer=None
            if condition_tokenizer is None
            else VQModel.from_pretrained(condition_tokenizer),
        )
        imported.save(out)
    model = imported.pipeline.model.config
    height, width = (side * model.downsample_factor for side in model.grid)
    condition = ", ".join(imported.pipeline.model.condition.keys) or model.condition.kind
    typer.echo(
        f"{imported.num_used} tensors make a pipeline of {model.transformer.num_layers} layers for pictures "
        f"of {height}x{width}, condition: {condition}, order: {model.order.kind}: {out}"
    )
    for reason, names in imported.left_out.items():
        typer.echo(f"left out {len(names)} tensors: {reason} (names in {out / 'import.json'})")
    for note in imported.notes:
        typer.echo(printable(f"note: {note}"))
