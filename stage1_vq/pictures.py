"""Pictures one by one for a tokenizer: at their own size, or all at one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from taming.data.folder import list_pictures
from taming.data.picture import read_picture
from taming.data.source import data_from, open_split
from taming.errors import UserError


def numbered_pictures(
    source: str, size: tuple[int, int] | None, factor: int, overrides: Sequence[str] = ()
) -> Iterator[tuple[int, str, Tensor]]:
    """(how many in all, key, picture (3, H, W) in [-1, 1]) of a folder, a config's data or "scenes".

    Pictures of a folder keep their own size where `size` is None, cropped about the centre to multiples of
    `factor`. Raises UserError.
    """
    folder = Path(source)
    if size is None and folder.is_dir() and not overrides:
        paths = list_pictures(folder)
        return (
            (len(paths), path.relative_to(folder).with_suffix("").as_posix(), read_cropped(path, factor))
            for path in paths
        )
    dataset = open_split(data_from(source, size=size or (64, 64), overrides=overrides), "all")

    def samples() -> Iterator[tuple[int, str, Tensor]]:
        for index in range(len(dataset)):
            sample = dataset.sample(index, -1)
            yield len(dataset), sample["key"], to_float(sample["image"])

    return samples()


def read_cropped(path: Path, factor: int) -> Tensor:
    """A picture (3, H, W) in [-1, 1], cropped about its centre to multiples of `factor`."""
    pixels = torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1)
    height, width = (side // factor * factor for side in pixels.shape[1:])
    if not height or not width:
        raise UserError(
            f"picture {path} is {pixels.shape[1]}x{pixels.shape[2]}, smaller than one cell of "
            f"{factor}x{factor} pixels; remove it or enlarge it"
        )
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return to_float(pixels[:, top : top + height, left : left + width])


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
