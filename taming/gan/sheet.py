"""A sheet of rows of pictures, each with a caption, to look at and to compare.

Axes: N pictures of a row, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from taming.data.picture import tile, to_uint8
from taming.options import printable

LEAST_WIDTH, MARGIN, CAPTION = 64, 8, 22
"""Pixels of the sheet; smaller pictures are enlarged by a whole factor."""
LONGEST_CAPTION = 120


def captioned_rows(rows: Sequence[tuple[str, Tensor]], *, columns: int | None = None) -> Tensor:
    """(caption, pictures (N, C, H, W) in [-1, 1]) -> one sheet on white (3, H', W') in [-1, 1].

    Rows may differ in their number and size of pictures; a row of more than `columns` goes on below. Grey
    pictures become RGB, of others the first three channels are shown.
    """
    blocks = [(printable(caption)[:LONGEST_CAPTION], _pixels(images, columns)) for caption, images in rows]
    font = ImageFont.load_default(size=14)
    captions = [int(font.getlength(caption)) for caption, _ in blocks]
    width = max(max(captions), *(block.width for _, block in blocks)) + 2 * MARGIN
    height = sum(CAPTION + block.height + MARGIN for _, block in blocks) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for caption, block in blocks:
        draw.text((MARGIN, top), caption, fill="black", font=font)
        sheet.paste(block, (MARGIN, top + CAPTION))
        top += CAPTION + block.height + MARGIN
    return rearrange(torch.from_numpy(np.array(sheet)), "h w c -> c h w").float() / 127.5 - 1


def _pixels(images: Tensor, columns: int | None) -> Image.Image:
    images = images.detach().float().cpu()
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    scale = max(1, -(-LEAST_WIDTH // images.shape[3]))
    enlarged = functional.interpolate(images, scale_factor=scale, mode="nearest")
    sheet = tile(enlarged, columns or len(enlarged))
    return Image.fromarray(np.ascontiguousarray(rearrange(to_uint8(sheet), "c h w -> h w c").numpy()))
