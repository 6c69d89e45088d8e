"""`taming gan sample`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from taming.options import BatchSize, Device, check_empty, empty_folder, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from taming.gan.model import GANModel

COLUMNS = 12
"""Of the sheet; rows of more pictures go on below."""


def sample(
    model: Annotated[str, typer.Argument(help="A saved generator: a folder, a run, or a hub id.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder for the PNG files.")],
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class by name or number; may be repeated. Default: all of them."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Pictures of each class, or ways with --interpolate.")] = 8,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same pictures.")
    ] = 0,
    truncation: Annotated[
        float | None, typer.Option(help="Noise within so much of 0: smaller is less varied; 0.5 to 2.")
    ] = None,
    interpolate: Annotated[
        int | None, typer.Option(min=2, help="So many steps from each picture to the next one.")
    ] = None,
    between_classes: Annotated[
        bool, typer.Option(help="With --interpolate: from each class to the next, the noise stays.")
    ] = False,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Paint pictures from noise: PNG files, each with its settings in a JSON beside it, and a sheet."""
    import json

    from taming.data.picture import save_png
    from taming.disk import room_for
    from taming.errors import UserError
    from taming.gan.model import GANModel
    from taming.gan.sheet import captioned_rows
    from taming.training.distributed import pick_device

    if between_classes and interpolate is None:
        raise UserError("--between-classes says where --interpolate FRAMES goes; give that too")
    check_empty(out)
    gan = GANModel.from_pretrained(model).to(pick_device(device))
    if gan.config.channels not in (1, 3, 4):
        raise UserError(
            f"{model} paints {gan.config.channels} channels, which no PNG holds; sample it from Python"
        )
    asked = _asked(gan, classes or [])
    settings: dict[str, Any] = {"seed": seed, "truncation": truncation, "batch_size": batch_size}
    with progress_bar("sample") as report:
        if interpolate is None:
            rows = _sampled(gan, asked, num, settings, report)
        else:
            rows = _ways(gan, asked, num, interpolate, between_classes, settings, report)
    empty_folder(out)
    number, model_hash = 0, gan.content_hash()
    with room_for("pictures", out):
        for _, images, facts in rows:
            for picture, said in zip(images, facts, strict=True):
                save_png(picture, out / f"{number:04d}.png")
                everything = {
                    "model": model,
                    "model_hash": model_hash,
                    "picture": number,
                    "height": picture.shape[1],
                    "width": picture.shape[2],
                    **said,
                    "seed": seed,
                    "truncation": truncation,
                }
                text = json.dumps(everything, indent=1) + "\n"
                (out / f"{number:04d}.json").write_text(text, encoding="utf-8")
                number += 1
        sheet = captioned_rows(
            [(caption, images) for caption, images, _ in rows], columns=interpolate or COLUMNS
        )
        save_png(sheet, out / "sheet.png")
    what = "way" if interpolate else "class" if asked != [None] else "model"
    typer.echo(f"{number} pictures in {out}, a row a {what} in {out / 'sheet.png'}")


Row = tuple[str, "Tensor", list[dict[str, Any]]]
"""Caption, pictures (N, C, H, W), and what is said beside each."""


def _asked(gan: GANModel, classes: list[str]) -> list[int | None]:
    """The classes to paint, by number; [None] of a model without any. Raises UserError."""
    if classes:
        return [gan.class_number(name) for name in classes]
    return [None] if gan.config.num_classes is None else list(range(gan.config.num_classes))


def _sampled(
    gan: GANModel, asked: list[int | None], num: int, settings: dict[str, Any], report: Any
) -> list[Row]:
    rows: list[Row] = []
    for row, number in enumerate(asked):
        done = row * num

        def part(painted: int, _: int, done: int = done) -> None:
            report(done + painted, len(asked) * num)

        images = gan.sample(num, classes=number, **settings, progress=part)
        said = [{**_class_facts(gan, number), "noise": place} for place in range(num)]
        rows.append((_class_caption(gan, number), images, said))
    return rows


def _ways(
    gan: GANModel,
    asked: list[int | None],
    num: int,
    frames: int,
    between_classes: bool,
    settings: dict[str, Any],
    report: Any,
) -> list[Row]:
    """Of each class `num` ways, from picture k to k + 1; or of each class to the next with the noise of k."""
    from taming.errors import UserError

    if between_classes:
        if len(asked) < 2:
            raise UserError("--between-classes goes from a class to the next: give two or more --class")
        legs = [(start, end, (k, k)) for k in range(num) for start, end in pairwise(asked)]
    else:
        legs = [(number, number, (k, k + 1)) for number in asked for k in range(num)]
    rows: list[Row] = []
    for row, (start, end, places) in enumerate(legs):
        classes = None if start is None or end is None else (start, end)
        images = gan.interpolate(frames, places=places, classes=classes, **settings)
        report(row + 1, len(legs))
        caption = f"noise {places[0]} to {places[1]}"
        if start is not None:
            caption = f"{_class_caption(gan, start)}: {caption}"
        if start != end:
            caption = f"{_class_caption(gan, start)} to {_class_caption(gan, end)}: noise {places[0]}"
        said = [
            {
                "from": {**_class_facts(gan, start), "noise": places[0]},
                "to": {**_class_facts(gan, end), "noise": places[1]},
                "share": frame / (frames - 1),
            }
            for frame in range(frames)
        ]
        rows.append((caption, images, said))
    return rows


def _class_caption(gan: GANModel, number: int | None) -> str:
    return "pictures" if number is None else gan.class_name(number)


def _class_facts(gan: GANModel, number: int | None) -> dict[str, Any]:
    return {} if number is None else {"class": number, "class_name": gan.class_name(number)}
