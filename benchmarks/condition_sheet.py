"""A contact sheet of conditions: what was asked for, what was sampled, and the scene that it came from.

Axes: B columns, H W pixels.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taming.data.picture import to_uint8

SCALE, MARGIN, CAPTION = 2, 8, 22
PIXELS = 64 * SCALE


@dataclass(frozen=True)
class Row:
    """One condition: B of its values, B samples and the B scenes whose values they are."""

    name: str
    asked: Tensor | list[str]
    samples: Tensor
    scenes: Tensor


def condition_sheet(rows: list[Row]) -> Tensor:
    """For every condition a line of [asked | sampled | scene] triples: (3, H, W) in [-1, 1]."""
    columns = len(rows[0].samples)
    width = columns * (3 * PIXELS + 3 * MARGIN) + MARGIN
    height = len(rows) * (PIXELS + CAPTION + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    top = MARGIN
    for row in rows:
        draw.text((MARGIN, top), f"{row.name}: asked, sampled, its scene", fill="black", font=font)
        for column in range(columns):
            left = MARGIN + column * (3 * PIXELS + 3 * MARGIN)
            asked = row.asked[column]
            if isinstance(asked, str):
                text = "\n".join(textwrap.wrap(asked, 18))
                draw.text((left + 4, top + CAPTION + 4), text, fill="black", font=small)
            else:
                sheet.paste(_enlarged(asked), (left, top + CAPTION))
            for place, picture in enumerate((row.samples[column], row.scenes[column]), start=1):
                sheet.paste(_enlarged(picture), (left + place * (PIXELS + 2), top + CAPTION))
        top += PIXELS + CAPTION + MARGIN
    return rearrange(torch.from_numpy(np.array(sheet)), "h w c -> c h w").float() / 127.5 - 1


def _enlarged(picture: Tensor) -> Image.Image:
    pixels = rearrange(to_uint8(picture.cpu()), "c h w -> h w c").numpy()
    return Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.NEAREST)
