"""`taming ar sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taming.options import BatchSize, Device, empty_folder, parse_size, progress_bar


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
    greedy: Annotated[bool, typer.Option(help="Always the most probable code.")] = False,
    window_stride: Annotated[
        int,
        typer.Option(min=1, help="Cells that the window of a large picture moves at once; 1 as published."),
    ] = 1,
    schedule: Annotated[str, typer.Option(help="serial, or wavefront: several rows at once.")] = "serial",
    batch_size: BatchSize = 16,
    bf16: Annotated[
        bool, typer.Option(help="Half-precision transformer: faster, not quite the same codes.")
    ] = False,
    device: Device = None,
) -> None:
    """Paint pictures: PNG files, each with its settings in a JSON beside it, and a sheet."""
    import json

    import torch

    from stage2_ar import ARPipeline
    from stage2_ar.sample_inputs import ConditionFiles, read_conditions
    from taming.data.picture import save_png, tile
    from taming.errors import UserError
    from taming.training.distributed import pick_device

    if schedule not in ("serial", "wavefront"):
        raise UserError(f"--schedule {schedule!r}: choose serial or wavefront")
    pipe = ARPipeline.from_pretrained(model).to(pick_device(device), torch.bfloat16 if bf16 else None)
    files = ConditionFiles(
        classes=classes or [],
        segmentation=segmentation or [],
        depth=depth or [],
        image=image or [],
        objects=objects or [],
        text=text or [],
    )
    given = read_conditions(files, pipe.model, None if size is None else parse_size(size))
    height, width = given.size or (None, None)
    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guidance_scale": guidance,
        "seed": seed,
        "greedy": greedy,
        "window_stride": window_stride,
        "schedule": schedule,
    }
    pipe.model.condition.read(given.values)  # before the folder is made
    empty_folder(out)
    with progress_bar("sample") as report:
        result = pipe(
            given.values,
            height=height,
            width=width,
            num_images=num,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance,
            seed=seed,
            greedy=greedy,
            schedule=schedule,  # type: ignore[arg-type]
            window_stride=window_stride,
            batch_size=batch_size,
            progress=report,
        )
    for number, painted in enumerate(result.images):
        save_png(painted, out / f"{number:04d}.png")
        facts = {
            "model": model,
            "conditions": given.of_row(number // num),
            "picture": number,
            "height": painted.shape[1],
            "width": painted.shape[2],
            "precision": "bf16" if bf16 else "fp32",
            **settings,
        }
        (out / f"{number:04d}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    save_png(tile(result.images.cpu(), columns=num), out / "sheet.png")
    typer.echo(f"{len(result.images)} pictures in {out}, a row a condition in {out / 'sheet.png'}")
