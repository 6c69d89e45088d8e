"""The demo's contact sheet: what went in and what came out, on one picture with captions.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from taming.data.label_colours import paint_labels
from taming.data.picture import tile, to_uint8

SCALE, MARGIN, CAPTION = 2, 10, 26


def contact_sheet(
    images: Tensor,
    reconstructions: Tensor,
    maps: Tensor,
    samples: Tensor,
    wide_map: Tensor,
    wide: Tensor,
) -> Tensor:
    """Three sections on white, (3, H', W') in [-1, 1].

    Held-out pictures (B, 3, H, W) over their reconstructions; label maps (M, H, W), each followed by its
    samples (M * n, 3, H, W); a wide map (1, H, W') beside the picture sampled from it (1, 3, H, W').
    """
    per_map = len(samples) // len(maps)
    rows = torch.cat(
        [
            torch.cat((paint_labels(label_map[None]), group))
            for label_map, group in zip(maps, samples.split(per_map), strict=True)
        ]
    )
    sections = [
        (
            "held-out pictures, and their reconstructions",
            tile(torch.cat((images, reconstructions)), len(images)),
        ),
        (f"label maps, and {per_map} samples of each", tile(rows, 2 * (1 + per_map))),
        ("a wide label map, and a sliding-window sample", tile(torch.cat((paint_labels(wide_map), wide)), 2)),
    ]
    blocks = [(caption, _pixels(picture)) for caption, picture in sections]
    width = max(block.width for _, block in blocks) + 2 * MARGIN
    height = sum(block.height + CAPTION + MARGIN for _, block in blocks) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=15)
    top = MARGIN
    for caption, block in blocks:
        draw.text((MARGIN, top), caption, fill="black", font=font)
        sheet.paste(block, (MARGIN, top + CAPTION))
        top += CAPTION + block.height + MARGIN
    return rearrange(torch.from_numpy(np.array(sheet)), "h w c -> c h w").float() / 127.5 - 1


def _pixels(picture: Tensor) -> Image.Image:
    enlarged = functional.interpolate(picture[None].cpu(), scale_factor=SCALE, mode="nearest")[0]
    return Image.fromarray(rearrange(to_uint8(enlarged), "c h w -> h w c").numpy())
