"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv:2006.10738).

Axes: B pictures, C channels, H W pixels, S size of either side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum
from pydantic import Field, model_validator
from torch import Tensor

from taming.config import Config

Augmentation = Literal["color", "scaling", "translation", "cutout"]
ORDER: tuple[Augmentation, ...] = ("color", "scaling", "translation", "cutout")


class AugmentConfig(Config):
    """What is done at random to each picture. In a file a list of names alone says the `policy`."""

    policy: tuple[Augmentation, ...] = ()
    """Done in the published order: color, (scaling,) translation, cutout, whatever the order here."""
    translation: float = Field(default=1 / 8, ge=0, lt=1)
    """Largest shift, as a share of each side."""
    cutout: float = Field(default=1 / 2, ge=0, le=1)
    """Each side of the rectangle that is cut out, as a share of the picture's."""
    cutout_probability: float = Field(default=1.0, ge=0, le=1)
    """Share of the pictures that cutout is done to, of those that anything is done to."""
    scaling: float = Field(default=1.25, ge=1, le=4)
    """Pictures are enlarged by a factor between its reciprocal and it (a choice of ours)."""
    probability: float = Field(default=1.0, ge=0, le=1)
    """Share of the pictures that each augmentation is done to, drawn for each by itself."""

    @model_validator(mode="before")
    @classmethod
    def _of_names(cls, values: Any) -> Any:
        return {"policy": values} if isinstance(values, list | tuple) else values

    def share(self, name: Augmentation) -> float:
        """Of the pictures that `name` is done to."""
        return self.probability * (self.cutout_probability if name == "cutout" else 1.0)


@dataclass(frozen=True)
class View:
    """One way of looking at a batch: the same random draws for whatever pictures it is called with.

    Calling it with (B, C, H, W) gives the same shape; gradients pass through, of any order, and are zero
    where pixels were cut out or shifted away. A view of nothing returns its argument.
    """

    config: AugmentConfig
    draws: Tensor
    """(B, 7) in [0, 1): brightness, saturation, contrast, rows, columns, top, left."""
    more: Tensor | None = None
    """(B, 5) in [0, 1), where anything is left to them: the factor of scaling, and of each of ORDER whether
    it is done."""

    def __call__(self, images: Tensor) -> Tensor:
        for number, name in enumerate(ORDER):
            share = self.config.share(name)
            if name not in self.config.policy or not share:
                continue
            changed = _APPLY[name](images, self)
            if share < 1:
                assert self.more is not None
                done = self.more[:, 1 + number] < share
                changed = torch.where(done[:, None, None, None], changed, images)
            images = changed
        return images


def draw_view(
    config: AugmentConfig,
    images: Tensor,
    *,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
    in_all: int | None = None,
    stream: int = 0,
) -> View:
    """A random view of the pictures from number `first` on of the `in_all` (None: these) of a step.

    A function of seed, step, stream and each picture's place in the step, whatever processes and
    micro-batches share it. An empty policy draws nothing.
    """
    if not config.policy:
        return View(config, images.new_empty(0))

    def draw(number: int, block: int) -> Tensor:
        counter = np.array([0, 0, block, stream << 32], dtype=np.uint64)  # apart from those of noise.py
        key = np.array([seed, step], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        rows = first + len(images) if in_all is None else in_all
        draws = random.random((rows, number), dtype=np.float32)
        return torch.from_numpy(draws[first : first + len(images)]).to(images.device)

    by_chance = any(config.share(name) < 1 for name in config.policy)
    more = draw(1 + len(ORDER), 1) if by_chance or "scaling" in config.policy else None
    return View(config, draw(7, 0), more)


def _color(images: Tensor, view: View) -> Tensor:
    """Brightness + U(-0.5, 0.5); saturation x U(0, 2) about the channels' mean; contrast x U(0.5, 1.5)."""
    brightness, saturation, contrast = (view.draws[:, i, None, None, None] for i in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _scaling(images: Tensor, view: View) -> Tensor:
    """Enlarged about the centre by scaling^U(-1, 1), bilinear, with zeros coming in."""
    assert view.more is not None
    factor = view.config.scaling ** (2 * view.more[:, 0] - 1)
    rows, columns = (_resampling(factor, size).to(images.dtype) for size in images.shape[2:])
    return einsum(rows, columns, images, "b i h, b j w, b c h w -> b c i j")


def _resampling(factor: Tensor, size: int) -> Tensor:
    """(B, S, S): what each pixel of an axis takes of each, where factor (B,) enlarges."""
    positions = torch.arange(size, device=factor.device, dtype=torch.float32)
    centre = (size - 1) / 2
    source = (positions - centre) / factor[:, None] + centre
    return (1 - (source[:, :, None] - positions).abs()).clamp(min=0)


def _translation(images: Tensor, view: View) -> Tensor:
    """Whole pixels up to a share of each side, with zeros coming in."""
    _, _, height, width = images.shape
    rows = _shifted(view.draws[:, 3], height, view.config.translation)
    columns = _shifted(view.draws[:, 4], width, view.config.translation)
    padded = F.pad(images, (1, 1, 1, 1))  # index 0 and the last are the zeros
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    # (B, H, 1) and (B, 1, W) index the padded (B, H + 2, W + 2, C).
    found = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2)


def _shifted(draw: Tensor, size: int, share: float) -> Tensor:
    """(B, size) indices into an axis with one zero before and one after."""
    largest = int(size * share + 0.5)
    shift = (draw * (2 * largest + 1)).floor().long() - largest
    positions = torch.arange(size, device=draw.device) + shift[:, None]
    return (positions + 1).clamp(0, size + 1)


def _cutout(images: Tensor, view: View) -> Tensor:
    """Zeros in a rectangle of a share of each side, centred anywhere."""
    _, _, height, width = images.shape
    rows, columns = (
        _covered(view.draws[:, place], size, view.config.cutout) for place, size in ((5, height), (6, width))
    )
    return images * ~(rows[:, :, None] & columns[:, None, :])[:, None]


def _covered(draw: Tensor, size: int, share: float) -> Tensor:
    """(B, size) bool: the stretch that is cut out of an axis."""
    length = int(size * share + 0.5)
    start = (draw * (size + 1 - length % 2)).floor().long() - length // 2
    positions = torch.arange(size, device=draw.device)
    return (positions >= start[:, None]) & (positions < start[:, None] + length)


_APPLY: dict[Augmentation, Callable[[Tensor, View], Tensor]] = {
    "color": _color,
    "scaling": _scaling,
    "translation": _translation,
    "cutout": _cutout,
}
