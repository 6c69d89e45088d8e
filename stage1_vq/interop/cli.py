"""`taming vq import` and `taming vq export`. Registered by stage1_vq.cli."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taming.errors import UserError
from taming.options import parse_size, printable, show_figures

if TYPE_CHECKING:
    from stage1_vq.interop.imported import Imported

PROGRAMS = ("taming-transformers", "llamagen", "diffusers")
FORMATS = ("diffusers", "onnx", "codebook")
PARTS = ("first_stage_model", "cond_stage_model")


def import_model(
    program: Annotated[str, typer.Argument(metavar="|".join(PROGRAMS), help="Whose model it is.")],
    source: Annotated[Path, typer.Argument(help="Its checkpoint; of diffusers, the model's folder.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the tokenizer.")],
    config: Annotated[
        Path | None, typer.Option(help="taming-transformers: the YAML that came with the checkpoint.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Of a transformer's checkpoint: first_stage_model or cond_stage_model."),
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving averages of the weights.")] = False,
) -> None:
    """Make a tokenizer of another program's model. Its pickles are read without running their code."""
    from stage1_vq.interop.exported import new_folder

    with new_folder(out):
        imported = read_model(program, source, config=config, part=part, ema=ema)
        imported.save(out)
    spec = imported.model.spec
    typer.echo(
        f"{imported.num_used} tensors make a tokenizer of {spec.codebook_size} codes of width "
        f"{spec.code_dim}, f{spec.downsample_factor}, for {imported.model.config.input}: {out}"
    )
    if imported.discriminator is not None:
        typer.echo(f"its discriminator is in {out / 'discriminator'}")
    for reason, names in imported.left_out.items():
        typer.echo(f"left out {len(names)} tensors: {reason} (names in {out / 'import.json'})")
    for note in imported.notes:
        typer.echo(printable(f"note: {note}"))


def read_model(
    program: str, source: Path, *, config: Path | None = None, part: str | None = None, ema: bool = False
) -> Imported:
    """The model of `program` (one of PROGRAMS) at `source`. Raises UserError."""
    given = {"--config": config is not None, "--part": part is not None, "--ema": ema}
    takes = {"taming-transformers": ("--config", "--part", "--ema"), "llamagen": ("--ema",), "diffusers": ()}
    if program not in takes:
        raise UserError(f"no importer for {program!r}; there are {', '.join(PROGRAMS)}")
    odd = [name for name, is_given in given.items() if is_given and name not in takes[program]]
    if odd:
        raise UserError(f"{odd[0]} is not for {program}: its model follows from {source} alone")
    if part is not None and part not in PARTS:
        raise UserError(f"no part {part!r}; there are {', '.join(PARTS)}")
    match program:
        case "taming-transformers":
            from stage1_vq.interop.taming_transformers import import_taming_transformers

            chosen: Any = part
            return import_taming_transformers(source, config=config, part=chosen, ema=ema)
        case "llamagen":
            from stage1_vq.interop.llamagen import import_llamagen

            return import_llamagen(source, ema=ema)
        case _:
            from stage1_vq.interop.diffusers import import_diffusers

            return import_diffusers(source)


def export_model(
    model: Annotated[str, typer.Argument(help="A saved tokenizer: a folder, a run, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the export.")],
    format: Annotated[str, typer.Option("--format", metavar="|".join(FORMATS), help="What others read.")],
    pictures: Annotated[
        str | None, typer.Option(help="Folder to compare on; default: the built-in scenes.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels to compare at: 64, or HxW; default: as trained.")
    ] = None,
    num_pictures: Annotated[int, typer.Option(min=1, help="Pictures to compare on, at most.")] = 50,
) -> None:
    """Write a tokenizer for other programs, load it again, and compare both on pictures."""
    if format not in FORMATS:
        raise UserError(f"no export format {format!r}; there are {', '.join(FORMATS)}")
    frame = None if size is None else parse_size(size)
    from stage1_vq import VQModel
    from stage1_vq.interop.exported import comparison_inputs

    tokenizer = VQModel.from_pretrained(model)
    inputs = comparison_inputs(tokenizer, pictures, frame, num_pictures)
    export: Any
    match format:
        case "diffusers":
            from stage1_vq.interop.diffusers import export_diffusers as export
        case "onnx":
            from stage1_vq.interop.onnx import export_onnx as export
        case _:
            from stage1_vq.interop.codebook import export_codebook as export
    report = export(tokenizer, out, inputs)
    figures = report.as_values()
    figures["equal_codes"] = "-" if report.equal_codes is None else f"{report.equal_codes:.4%}"
    figures["picture_difference"] = f"{report.picture_difference:.2g}"
    show_figures(f"{model} as {format} in {out}", figures, None)
