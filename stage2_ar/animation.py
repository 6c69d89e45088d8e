"""A picture as it fills, cell by cell in the order of its writing.

Axes: F frames, C channels, H W pixels, h w cells.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from taming.data.picture import to_uint8
from taming.errors import UserError

GREY = 0.0
SUFFIXES = {"gif": ".gif", "webp": ".webp"}


def filling_frames(image: Tensor, ranks: Tensor, frames: int) -> Tensor:
    """Frames (F, C, H, W) of a picture (C, H, W) in [-1, 1]: the last is the picture itself.

    ranks (h, w): when each cell was written, from 1 on, and 0 for cells that were given, which the first
    frame shows. Cells that are yet to come are grey. The picture is decoded once, at its end: a decoder sees
    beyond a cell, so that half-written grids would flicker as they fill. What a frame shows is therefore what
    the finished picture is made of, not what the decoder would make of the codes so far.
    Raises UserError for fewer than 2 frames.
    """
    if frames < 2:
        raise UserError(f"an animation has at least 2 frames, not {frames}")
    factor = image.shape[1] // ranks.shape[0]
    steps = torch.linspace(0, float(ranks.max()), frames, dtype=torch.float64).ceil()
    pixel_ranks = ranks.repeat_interleave(factor, 0).repeat_interleave(factor, 1).to(image.device)
    shown = pixel_ranks <= steps.to(image.device)[:, None, None]
    return torch.where(shown[:, None], image, torch.full_like(image, GREY))


def save_animation(frames: Tensor, path: str | Path, *, seconds: float = 3.0, hold: float = 1.5) -> None:
    """Write frames (F, C, H, W), C 1 or 3, as an animation that repeats: GIF or WebP by the path's suffix.

    It fills in `seconds` and then shows the last frame for `hold` more. Raises UserError for another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES.values():
        raise UserError(f"animation {path.name}: choose gif or webp")
    pixels = rearrange(to_uint8(frames).cpu(), "f c h w -> f h w c").numpy()
    pictures = [
        Image.fromarray(np.ascontiguousarray(frame[..., 0] if frame.shape[-1] == 1 else frame))
        for frame in pixels
    ]
    each = max(round(1000 * seconds / len(pictures)), 20)
    durations = [each] * (len(pictures) - 1) + [each + round(1000 * hold)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures = [picture.convert("RGB").quantize(256) for picture in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
