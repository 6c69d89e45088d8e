"""Label maps that a user gives to sample from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from taming.data.picture import read_labels
from taming.data.transforms import choose_crop, crop_labels
from taming.errors import UserError


def read_maps(paths: Sequence[Path], size: tuple[int, int] | None, factor: int) -> Tensor:
    """Maps (B, H, W) int64 at `size` pixels, covered and cropped about the centre, labels never mixed.

    Without a size: the maps' own, cropped to multiples of `factor`. Raises UserError where they differ.
    """
    maps = [read_labels(path) for path in paths]
    if size is None:
        shapes = {labels.shape for labels in maps}
        if len(shapes) > 1:
            raise UserError(
                f"the maps differ in size ({', '.join(map(str, sorted(shapes)))}); give --size HxW"
            )
        height, width = (side // factor * factor for side in maps[0].shape)
        if not height or not width:
            raise UserError(
                f"map {paths[0]} is smaller than one cell of {factor}x{factor} pixels; give --size"
            )
        top, left = ((side - kept) // 2 for side, kept in zip(maps[0].shape, (height, width), strict=True))
        cut = [labels[top : top + height, left : left + width] for labels in maps]
    else:
        cut = [crop_labels(labels, choose_crop(labels.shape, size), size) for labels in maps]
    return torch.stack([torch.from_numpy(labels.copy()) for labels in cut])
