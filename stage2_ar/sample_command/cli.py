"""`taming ar sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taming.options import BatchSize, Device, Tile, check_empty, empty_folder, parse_size, progress_bar


def sample(
    model: Annotated[str, typer.Argument(help="A saved pipeline: a folder, a run, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the PNG files.")],
    classes: Annotated[
        list[int] | None, typer.Option("--class", help="Class to paint; may be repeated.")
    ] = None,
    segmentation: Annotated[
        list[Path] | None, typer.Option(help="Label map (PNG) to paint after; may be repeated.")
    ] = None,
    depth: Annotated[
        list[Path] | None, typer.Option(help="Map of inverse depth (grey PNG, white is nearest); as above.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Second picture, low resolution or edges, as the model was trained; as above."),
    ] = None,
    objects: Annotated[
        list[Path] | None, typer.Option(help="Layout of objects (JSON) to paint after; may be repeated.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="What to paint, in words; may be repeated.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels: 256, or HxW; default: as trained, or the files'.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures of each condition.")] = 4,
    seed: Annotated[int, typer.Option(help="The same seed gives the same pictures.")] = 0,
    temperature: Annotated[float, typer.Option(help="Below 1: more probable, less varied.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most probable codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most probable codes of this mass.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Above 1: closer to the condition.")] = 1.0,
    guidance_schedule: Annotated[
        str, typer.Option(help="constant, or linear or cosine: from --guidance-start on to --guidance.")
    ] = "constant",
    guidance_start: Annotated[float, typer.Option(help="Guidance of the first cell.")] = 1.0,
    guidance_power: Annotated[
        float, typer.Option(help="Of the cosine: above 1 it stays low for longer.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option(help="Always the most probable code.")] = False,
    best_of: Annotated[int, typer.Option(min=1, help="Paint so many, keep the most probable.")] = 1,
    complete: Annotated[Path | None, typer.Option(help="Picture to keep a part of (--keep, --mask).")] = None,
    keep: Annotated[str | None, typer.Option(help="upper (default), lower, left or right half.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="With --complete: picture that is white where to paint anew.")
    ] = None,
    outpaint: Annotated[Path | None, typer.Option(help="Picture to paint around, up to --size.")] = None,
    keep_pixels: Annotated[
        bool, typer.Option(help="Outside of the mask leave the original's very pixels.")
    ] = False,
    soft_border: Annotated[
        int | None, typer.Option(min=0, help="With --keep-pixels: pixels over which the new begins.")
    ] = None,
    variations: Annotated[Path | None, typer.Option(help="Picture to paint variations of.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Of variations: share of cells painted anew; default 0.5.")
    ] = None,
    from_row: Annotated[
        int | None, typer.Option(help="Of variations: paint anew all rows of cells from this one on.")
    ] = None,
    interpolate: Annotated[
        int | None, typer.Option(help="Steps from the first to the second of two conditions.")
    ] = None,
    animation: Annotated[str | None, typer.Option(help="gif or webp: the picture as it fills, too.")] = None,
    tile: Tile = None,
    window_stride: Annotated[
        int,
        typer.Option(min=1, help="Cells that the window of a large picture moves at once; 1 as published."),
    ] = 1,
    schedule: Annotated[
        str | None,
        typer.Option(help="serial, or wavefront: several rows at once. By default what suits the model."),
    ] = None,
    batch_size: BatchSize = 16,
    bf16: Annotated[
        bool, typer.Option(help="Half-precision transformer: faster, not quite the same codes.")
    ] = False,
    int8: Annotated[
        bool, typer.Option(help="Transformer with 8-bit weights, on a CPU: fastest, other codes are drawn.")
    ] = False,
    device: Device = None,
) -> None:
    """Paint pictures: PNG files, each with its settings in a JSON beside it, and a sheet."""
    import json

    import torch

    from stage2_ar import ARPipeline
    from stage2_ar.animation import SUFFIXES, save_animation
    from stage2_ar.sample_command.edits import EditOptions, read_edit
    from stage2_ar.sample_command.inputs import ConditionFiles, read_conditions
    from stage2_ar.sample_command.options import SampleOptions
    from stage2_ar.sample_command.sheet import sample_sheet
    from taming.data.picture import save_png
    from taming.errors import UserError
    from taming.training.distributed import pick_device

    if schedule not in (None, "serial", "wavefront"):
        raise UserError(f"--schedule {schedule!r}: choose serial or wavefront")
    if animation is not None and animation not in SUFFIXES:
        raise UserError(f"--animation {animation!r}: choose {' or '.join(SUFFIXES)}")
    edits = EditOptions(
        complete=complete,
        keep=keep,
        mask=mask,
        outpaint=outpaint,
        variations=variations,
        strength=strength,
        from_row=from_row,
        interpolate=interpolate,
        keep_pixels=keep_pixels,
        soft_border=soft_border,
    )
    edits.check()
    if bf16 and int8:
        raise UserError("--bf16 and --int8 exclude each other: 8-bit weights compute in bf16 already")
    pipe = ARPipeline.from_pretrained(model).to(
        pick_device(device), torch.bfloat16 if bf16 else None, weights="int8" if int8 else None
    )
    files = ConditionFiles(
        classes=classes or [],
        segmentation=segmentation or [],
        depth=depth or [],
        image=image or [],
        objects=objects or [],
        text=text or [],
    )
    edit = read_edit(edits, pipe, None if size is None else parse_size(size))
    given = read_conditions(files, pipe.model, edit.size)
    settings: SampleOptions = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance_scale": guidance,
        "guidance_schedule": guidance_schedule,  # type: ignore[typeddict-item]
        "guidance_start": guidance_start,
        "guidance_power": guidance_power,
        "seed": seed,
        "greedy": greedy,
        "best_of": best_of,
        "window_stride": window_stride,
        "schedule": schedule,  # type: ignore[typeddict-item]
        "tile": tile,
    }
    check_empty(out)  # the folder is made when there is something to put into it
    with progress_bar("sample") as report:
        asked: SampleOptions = {**settings, "num_images": num, "batch_size": batch_size, "progress": report}
        result = edit.paint(pipe, given, asked)
    empty_folder(out)
    for number, painted in enumerate(result.images):
        save_png(painted, out / f"{number:04d}.png")
        facts = {
            "model": model,
            "conditions": given.said if interpolate else given.of_row(number // num),
            "picture": number,
            "height": painted.shape[1],
            "width": painted.shape[2],
            "precision": "int8" if int8 else "bf16" if bf16 else "fp32",
            **settings,
        }
        if edits.said():
            facts["edit"] = edits.said()
        if interpolate:
            facts["toward_second"] = number // num / (interpolate - 1)
        if result.scores is not None:
            facts["log_likelihoods"] = result.scores[number].tolist()
        (out / f"{number:04d}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if animation is not None:
            save_animation(result.animation(number), out / f"{number:04d}{SUFFIXES[animation]}")
    sheet = sample_sheet(pipe.model.condition, given.values, result.images.cpu(), num)
    save_png(sheet, out / "sheet.png")
    typer.echo(f"{len(result.images)} pictures in {out}, a row a condition in {out / 'sheet.png'}")
