"""Edits that a user asks `taming ar sample` for: which one, of which picture, and how it is painted.

Axes: C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from torch import Tensor

from stage2_ar.masks import Side
from stage2_ar.pipeline import ARPipeline, PipelineOutput
from stage2_ar.sample_command.given import picture_pixels
from stage2_ar.sample_command.inputs import GivenConditions
from stage2_ar.sample_command.options import SampleOptions
from taming.data.picture import read_size
from taming.errors import UserError

Size = tuple[int, int]


@dataclass(frozen=True)
class EditOptions:
    """The options of the command that say what is done to a picture, None where they are not given."""

    complete: Path | None = None
    keep: str | None = None
    mask: Path | None = None
    outpaint: Path | None = None
    variations: Path | None = None
    strength: float | None = None
    from_row: int | None = None
    interpolate: int | None = None
    keep_pixels: bool = False
    soft_border: int | None = None

    @property
    def picture(self) -> Path | None:
        """The picture that is painted on."""
        return self.complete or self.outpaint or self.variations

    def check(self) -> None:
        """Raises UserError for options that exclude each other, or that belong to one that was not given."""
        ways = ("complete", "outpaint", "variations", "interpolate")
        asked = [f"--{way}" for way in ways if getattr(self, way) is not None]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} are different edits; give one of them")
        needs = {"keep": "complete", "mask": "complete", "strength": "variations", "from_row": "variations"}
        for name, way in needs.items():
            if getattr(self, name) is not None and getattr(self, way) is None:
                raise UserError(f"--{name.replace('_', '-')} belongs to --{way} PNG; give both or none")
        for first, second in (("keep", "mask"), ("strength", "from_row")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise UserError(f"--{first} and --{second.replace('_', '-')} exclude each other; give one")
        if self.keep is not None and self.keep not in get_args(Side):
            raise UserError(f"--keep {self.keep!r} is no side; choose {', '.join(get_args(Side))}")
        pixels = self.keep_pixels or self.soft_border is not None
        if pixels and self.complete is None and self.outpaint is None:
            raise UserError("--keep-pixels and --soft-border belong to --complete and --outpaint")
        if self.soft_border is not None and not self.keep_pixels:
            raise UserError("--soft-border is between kept and new pixels; give --keep-pixels as well")

    def said(self) -> dict[str, Any]:
        """What was asked for, for the file beside each picture."""
        values = {name: value for name, value in vars(self).items() if value not in (None, False)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@dataclass(frozen=True)
class Edit:
    """An edit with its files read; none of them where pictures are painted from nothing."""

    options: EditOptions
    image: Tensor | None = None
    """(1, C, H, W) in [-1, 1]."""
    mask: Tensor | None = None
    """(H, W) bool, True where painted anew."""
    size: Size | None = None
    """(H, W) pixels of what is painted: that of the picture, or of the frame around it."""

    def paint(self, pipe: ARPipeline, given: GivenConditions, options: SampleOptions) -> PipelineOutput:
        """Do it. Raises UserError for what does not fit the model."""
        conditions, asked = given.values, self.options
        if asked.interpolate is not None:
            first, second = two_rows(given)
            height, width = given.size or (None, None)
            return pipe.interpolate(first, second, asked.interpolate, height=height, width=width, **options)
        if self.image is None:
            height, width = given.size or (None, None)
            return pipe(conditions, height=height, width=width, **options)
        kept, soft = asked.keep_pixels, asked.soft_border or 0
        if self.mask is not None:
            return pipe.inpaint(
                self.image, self.mask, conditions, keep_pixels=kept, soft_border=soft, **options
            )
        if asked.complete is not None:
            side = cast(Side, asked.keep or "upper")
            return pipe.complete(self.image, side, conditions, keep_pixels=kept, soft_border=soft, **options)
        if asked.outpaint is not None:
            assert self.size is not None
            return pipe.outpaint(
                self.image, *self.size, conditions, keep_pixels=kept, soft_border=soft, **options
            )
        strength = 0.5 if asked.strength is None else asked.strength
        return pipe.vary(self.image, strength, conditions, from_row=asked.from_row, **options)


def read_edit(options: EditOptions, pipe: ARPipeline, size: Size | None) -> Edit:
    """Read the picture and the mask of an edit, at `size` pixels where that is given.

    A picture is scaled to cover `size` and cropped about its centre, but for outpainting, where `size` is the
    frame's. Raises UserError for files that cannot be read or do not fit, before anything is painted.
    """
    options.check()
    path = options.picture
    if path is None:
        return Edit(options, size=size)
    config = pipe.tokenizer.config
    if config.input != "image":
        raise UserError(
            f"this model paints {config.input}, not pictures: edits of files are for pictures; use "
            "ARPipeline in Python"
        )
    own, factor = read_size(path), config.downsample_factor
    if options.outpaint is not None and size is None:
        raise UserError("--outpaint needs the size of the whole: give --size HxW")
    target = own if size is None or options.outpaint is not None else size
    near = "x".join(str(max(side // factor, 1) * factor) for side in target)
    if any(side % factor for side in target):
        raise UserError(
            f"{path} at {target[0]}x{target[1]} pixels is not in whole cells of {factor}; "
            + ("crop it to " if options.outpaint is not None else "give --size ")
            + near
        )
    image = picture_pixels(path, config.in_channels, target)[None]
    mask = None
    if options.mask is not None:
        shape = read_size(options.mask)
        if shape != own:
            raise UserError(
                f"mask {options.mask} is {shape[0]}x{shape[1]} pixels and {path} {own[0]}x{own[1]}; give a "
                "mask of the picture's size, white where it shall be painted anew"
            )
        mask = picture_pixels(options.mask, 1, target)[0] > 0
    return Edit(options, image, mask, size or target)


def two_rows(given: GivenConditions) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two conditions that an interpolation goes between. Raises UserError where there are not two."""
    if given.rows != 2:
        count = given.rows if given.said else 0
        raise UserError(
            f"--interpolate goes between two conditions, but {count} are given; give each option "
            "twice, as in --class 1 --class 7"
        )
    first, second = ({name: value[row : row + 1] for name, value in given.values.items()} for row in (0, 1))
    return first, second
