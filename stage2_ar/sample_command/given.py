"""Maps and pictures that a user gives as files to sample from, brought to one size.

A file is scaled to cover the picture that shall be painted, and cropped about its centre; labels are never
mixed. Which reading a file gets follows from what the model's condition is made of.

Axes: B files, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stage2_ar.conditions.base import Condition
from stage2_ar.conditions.codes import CodesCondition
from stage2_ar.conditions.combined import CombinedCondition
from stage2_ar.conditions.image import LowResolutionCondition, SecondPictureCondition, edges_of
from taming.data.channels import read_pixels
from taming.data.picture import read_depth, read_labels, read_size
from taming.data.transforms import Crop, choose_crop, crop_depth, crop_labels, crop_plane
from taming.errors import UserError

Size = tuple[int, int]

EDGE_SHARE = 0.2
"""Of a pixel that edges must cover to be one, where an edge map is scaled."""


@dataclass(frozen=True)
class Form:
    """How a condition wants a picture."""

    key: str
    """Of the batch: it tells the kind of map or picture."""
    channels: int = 1
    scale: int = 1
    """How many times larger each side of the painted picture is."""


def read_given(
    condition: Condition, files: Mapping[str, Sequence[Path]], size: Size | None, factor: int
) -> tuple[dict[str, Tensor], Size | None]:
    """User's name -> what `ARPipeline` takes, (B, ...), and the size (H, W) of the pictures to paint.

    `files` holds the paths of each name ("segmentation", "depth", "image"). Without a `size` it is that of
    the files, cropped to whole cells of `factor` pixels; a low resolution counts as the picture that it is
    of. Raises UserError for a name that the condition does not have, files that cannot be read, and files
    that differ in size.
    """
    condition.refuse_unknown(files)
    read = [
        (name, _form(condition, name), path, _Plane(path, _form(condition, name)))
        for name, paths in files.items()
        for path in paths
    ]
    if not read:
        return {}, size
    own = size is None
    if size is None:
        size = _common_size([(path, form, plane.size) for _, form, path, plane in read], factor)
    for _, form, path, _ in read:
        if size[0] % form.scale or size[1] % form.scale:
            raise UserError(
                f"{path} cannot be a picture of {size[0]}x{size[1]} pixels made {form.scale} times smaller; "
                f"give a size that is a multiple of {math.lcm(form.scale, factor)}"
            )
    values: dict[str, list[Tensor]] = {name: [] for name in files}
    for name, form, _, plane in read:
        values[name].append(plane.at((size[0] // form.scale, size[1] // form.scale), own))
    return {name: torch.stack(found) for name, found in values.items() if found}, size


class _Plane:
    """One file, read in full, and cut out as its condition takes it."""

    def __init__(self, path: Path, form: Form) -> None:
        self.form = form
        match form.key:
            case "segmentation":
                self.values = read_labels(path)
            case "depth":
                self.values = read_depth(path)
            case "edges":
                self.values = read_pixels(path, 3)
            case _:
                self.values = read_pixels(path, form.channels)
        self.size: Size = (self.values.shape[-2], self.values.shape[-1])

    def at(self, size: Size, own: bool) -> Tensor:
        """Cut to `size`: of its `own` pixels where that is what they are, else scaled to cover it."""
        crop = _centred(self.size, size) if own else choose_crop(self.size, size)
        match self.form.key:
            case "segmentation":
                return torch.from_numpy(crop_labels(self.values, crop, size))
            case "depth":
                return torch.from_numpy(crop_depth(self.values, crop, size))[None]
            case "edges" if _is_edge_map(self.values):
                share = crop_plane(self.values[0] / 255, crop, size, resampling=Image.Resampling.BILINEAR)
                return torch.from_numpy(share > EDGE_SHARE)[None].float()
            case "edges":
                return edges_of(_pixels(self.values, crop, size)[None])[0]
            case _:
                return _pixels(self.values, crop, size)


def picture_pixels(path: Path, channels: int, size: Size) -> Tensor:
    """A picture as (C, H, W) in [-1, 1], scaled to cover `size` and cropped about its centre.

    Of its own size its pixels stay as they are. Raises UserError where it cannot be read.
    """
    return _Plane(path, Form("image", channels)).at(size, own=read_size(path) == size)


def scale_of(condition: Condition, name: str) -> int | None:
    """How many times larger a side the painted picture is than the one given as `name`; None where it is of
    the same size, or the condition has no such name."""
    if name not in condition.keys:
        return None
    scale = _form(condition, name).scale
    return scale if scale > 1 else None


def _form(condition: Condition, name: str) -> Form:
    """How a condition wants what the user calls `name`."""
    key = condition.keys[name]
    match condition:
        case CombinedCondition():
            return next(_form(part, name) for part in condition.members if name in part.keys)
        case LowResolutionCondition():
            return Form(key, condition.channels, condition.scale)
        case SecondPictureCondition():
            return Form(key, condition.channels)
        case CodesCondition():
            return Form(key, condition.facts.channels, condition.config.scale or 1)
        case _:
            return Form(key)


def _common_size(found: Sequence[tuple[Path, Form, Size]], factor: int) -> Size:
    """The size that all files are of, in whole cells and in whole pixels of a low resolution."""
    sizes: dict[Size, Path] = {}
    for path, form, (rows, columns) in found:
        step = math.lcm(factor, form.scale)
        height, width = (side * form.scale // step * step for side in (rows, columns))
        if not height or not width:
            raise UserError(
                f"{path} is {rows}x{columns} pixels, smaller than one cell of {factor}x{factor}; give --size"
            )
        sizes.setdefault((height, width), path)
    if len(sizes) > 1:
        told = ", ".join(f"{path.name} for {height}x{width}" for (height, width), path in sizes.items())
        raise UserError(
            f"the files differ in size ({told}); give --size HxW, and each is scaled and cropped to it"
        )
    return next(iter(sizes))


def _centred(shape: Size, size: Size) -> Crop:
    """Whole pixels about the centre, so that nothing is resampled."""
    (height, width), (rows, columns) = shape, size
    top, left = (height - rows) // 2, (width - columns) // 2
    return Crop(top / height, left / width, rows / height, columns / width)


def _is_edge_map(pixels: np.ndarray) -> bool:
    """Whether a picture (3, H, W) uint8 is black and white."""
    return bool(((pixels == 0) | (pixels == 255)).all() and (pixels == pixels[:1]).all())


def _pixels(pixels: np.ndarray, crop: Crop, size: Size) -> Tensor:
    """(C, H, W) of uint8, or float32 in [-1, 1], cut to `size` in [-1, 1]."""
    planes = pixels.astype(np.float32) / 127.5 - 1 if pixels.dtype == np.uint8 else pixels
    cut = np.stack([crop_plane(plane, crop, size) for plane in planes])
    return torch.from_numpy(cut.clip(-1, 1))  # bicubic filters overshoot
