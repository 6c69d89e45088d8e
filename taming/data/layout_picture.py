"""Layouts and captions as pictures to look at: boxes with class names, or words, on white.

Axes: B pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from taming.data.label_colours import paint_labels
from taming.data.picture import to_uint8
from taming.data.scenes import SceneObject

Size = tuple[int, int]


def paint_layout(objects: Sequence[SceneObject], size: Size, names: Sequence[str] = ()) -> Tensor:
    """One layout as (3, H, W) in [-1, 1]: a frame and a name an object, the largest under the others.

    A class without a name is shown by its number. Each class has the colour that it has in a label map.
    """
    height, width = size
    image, draw = _canvas(size)
    labels = torch.arange(max((item["label"] for item in objects), default=0) + 1)
    colours = rearrange(to_uint8(paint_labels(labels[None, None])), "1 c 1 k -> k c").tolist()
    font = _font(size)
    line = max(1, round(min(size) / 128))
    for item in sorted(objects, key=_area, reverse=True):
        x0, y0, x1, y1 = item["box"]
        colour = tuple(colours[item["label"]])
        corners = (
            round(x0 * (width - 1)),
            round(y0 * (height - 1)),
            round(x1 * (width - 1)),
            round(y1 * (height - 1)),
        )
        draw.rectangle(corners, outline=colour, width=line)
        name = names[item["label"]] if item["label"] < len(names) else str(item["label"])
        draw.text((corners[0] + line + 1, corners[1] + line), name, fill=colour, font=font)
    return _pixels(image)


def paint_text(text: str, size: Size) -> Tensor:
    """A caption as (3, H, W) in [-1, 1], broken into lines; what does not fit is cut off."""
    image, draw = _canvas(size)
    font = _font(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > size[1] - 4:
            lines.append(word)
        else:
            lines[-1] = longer
    draw.multiline_text((2, 1), "\n".join(lines), fill=(0, 0, 0), font=font, spacing=1)
    return _pixels(image)


def paint_layouts(layouts: Sequence[Sequence[SceneObject]], size: Size, names: Sequence[str] = ()) -> Tensor:
    """`paint_layout` of several: (B, 3, H, W)."""
    return torch.stack([paint_layout(objects, size, names) for objects in layouts])


def paint_texts(texts: Sequence[str], size: Size) -> Tensor:
    """`paint_text` of several: (B, 3, H, W)."""
    return torch.stack([paint_text(text, size) for text in texts])


def _canvas(size: Size) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (size[1], size[0]), "white")
    return image, ImageDraw.Draw(image)


def _font(size: Size) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(8, min(size) // 16))


def _pixels(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").float() / 127.5 - 1


def _area(item: SceneObject) -> float:
    x0, y0, x1, y1 = item["box"]
    return (x1 - x0) * (y1 - y0)
