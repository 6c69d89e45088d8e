"""A sheet to look at: the pictures that a tokenizer keeps best, those in the middle, and the worst."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from stage1_vq.evaluate import Evaluation, reconstruct
from stage1_vq.inputs import as_picture, model_input
from stage1_vq.model import VQModel
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.picture import to_uint8

PER_GROUP = 4
LEAST_WIDTH, GAP, TITLE, LABEL = 128, 8, 24, 32
"""Pixels of the sheet; smaller pictures are enlarged by a whole factor."""


def choose_examples(values: Sequence[float], per_group: int = PER_GROUP) -> dict[str, list[int]]:
    """Places of the best, the median and the worst of `values` (higher is better), best first, none twice."""
    order = sorted(range(len(values)), key=lambda n: (-values[n], n))
    count = min(per_group, max(1, len(order) // 3))
    groups = {"best": order[:count]}
    rest = order[count:]
    worst = rest[max(len(rest) - count, 0) :]
    rest = rest[: len(rest) - len(worst)]
    first = max((len(rest) - count) // 2, 0)
    groups |= {"median": rest[first : first + count], "worst": worst}
    return {name: places for name, places in groups.items() if places}


@torch.no_grad()
def survival_sheet(
    model: VQModel, dataset: PictureDataset, evaluation: Evaluation, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Groups by the evaluation's first figure, picture over reconstruction: (3, H', W') in [-1, 1]."""
    figure, values = next(iter(evaluation.rows.items()))
    groups = {}
    for name, places in choose_examples(values).items():
        batch = to_device(dataset.batch(places, [-1] * len(places)), device)
        inputs = model_input(batch, model.config)
        _, output = reconstruct(model, inputs)
        rows = [as_picture(values, model.config).cpu() for values in (inputs, output)]
        labels = [(evaluation.keys[place], f"{values[place]:.4g}") for place in places]
        groups[f"{name} by {figure}"] = (torch.cat(rows, dim=2), labels)
    return _draw(groups)


def _draw(groups: dict[str, tuple[Tensor, list[tuple[str, str]]]]) -> Tensor:
    """Title -> (pictures (n, C, H, W), two lines of label each), a row a group."""
    first = next(iter(groups.values()))[0]
    scale = max(1, -(-LEAST_WIDTH // first.shape[3]))
    height, width = first.shape[2] * scale, first.shape[3] * scale
    columns = max(len(labels) for _, labels in groups.values())
    row = TITLE + height + LABEL + GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, len(groups) * row + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    title_font, label_font = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    for number, (title, (pictures, labels)) in enumerate(groups.items()):
        top = GAP + number * row
        draw.text((GAP, top), title, fill="black", font=title_font)
        enlarged = functional.interpolate(pictures, scale_factor=scale, mode="nearest")
        for column, (picture, label) in enumerate(zip(enlarged, labels, strict=True)):
            left = GAP + column * (width + GAP)
            pixels = rearrange(to_uint8(picture.expand(3, -1, -1)), "c h w -> h w c")
            sheet.paste(Image.fromarray(pixels.numpy()), (left, top + TITLE))
            for line, text in enumerate(label):
                place = (left, top + TITLE + height + 2 + 14 * line)
                draw.text(place, _fitting(draw, text, label_font, width), fill="black", font=label_font)
    return rearrange(torch.from_numpy(np.array(sheet)), "h w c -> c h w").float() / 127.5 - 1


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """`text`, or its end where it is longer than `width` pixels: names differ at their ends."""
    shown = text
    while len(shown) > 2 and draw.textlength(shown, font=font) > width:
        text = text[1:]
        shown = f"…{text}"
    return shown
