"""Differentiable augmentation of what a discriminator sees (Zhao et al. 2020, arXiv:2006.10738).

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Literal["color", "translation", "cutout"]
TRANSLATION, CUTOUT = 1 / 8, 1 / 2
"""Largest shift, and the side of the square that is cut out, as shares of the picture."""


@dataclass(frozen=True)
class View:
    """One way of looking at a batch: the same random draws for whatever pictures it is called with.

    Calling it with (B, C, H, W) gives the same shape; gradients pass through, and are zero where pixels were
    cut out or shifted away. A view of nothing returns its argument.
    """

    policy: tuple[Augmentation, ...]
    draws: Tensor
    """(B, 7) in [0, 1): brightness, saturation, contrast, rows, columns, top, left."""

    def __call__(self, images: Tensor) -> Tensor:
        for name in ("color", "translation", "cutout"):  # in the published order
            if name in self.policy:
                images = _APPLY[name](images, self.draws)
        return images


def draw_view(
    policy: Sequence[Augmentation],
    images: Tensor,
    *,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
    in_all: int | None = None,
) -> View:
    """A random view of the pictures from number `first` on of the `in_all` (None: these) of a step.

    A function of seed, step and each picture's place in the step, whatever processes and micro-batches share
    it. An empty policy draws nothing.
    """
    if not policy:
        return View((), images.new_empty(0))
    random = np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))
    draws = random.random((first + len(images) if in_all is None else in_all, 7), dtype=np.float32)
    return View(tuple(policy), torch.from_numpy(draws[first : first + len(images)]).to(images.device))


def _color(images: Tensor, draws: Tensor) -> Tensor:
    """Brightness + U(-0.5, 0.5); saturation x U(0, 2) about the channels' mean; contrast x U(0.5, 1.5)."""
    brightness, saturation, contrast = (draws[:, i, None, None, None] for i in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translation(images: Tensor, draws: Tensor) -> Tensor:
    """Whole pixels up to an eighth of each side, with zeros coming in."""
    _, _, height, width = images.shape
    rows = _shifted(draws[:, 3], height)
    columns = _shifted(draws[:, 4], width)
    padded = F.pad(images, (1, 1, 1, 1))  # index 0 and the last are the zeros
    picture = torch.arange(len(images), device=images.device)[:, None, None]
    # (B, H, 1) and (B, 1, W) index the padded (B, H + 2, W + 2, C).
    found = padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2)


def _shifted(draw: Tensor, size: int) -> Tensor:
    """(B, size) indices into an axis with one zero before and one after."""
    largest = int(size * TRANSLATION + 0.5)
    shift = (draw * (2 * largest + 1)).floor().long() - largest
    positions = torch.arange(size, device=draw.device) + shift[:, None]
    return (positions + 1).clamp(0, size + 1)


def _cutout(images: Tensor, draws: Tensor) -> Tensor:
    """Zeros in a rectangle of half of each side, centred anywhere."""
    _, _, height, width = images.shape
    inside = _covered(draws[:, 5], height)[:, :, None] & _covered(draws[:, 6], width)[:, None, :]
    return images * ~inside[:, None]


def _covered(draw: Tensor, size: int) -> Tensor:
    """(B, size) bool: the stretch that is cut out of an axis."""
    length = int(size * CUTOUT + 0.5)
    start = (draw * (size + 1 - length % 2)).floor().long() - length // 2
    positions = torch.arange(size, device=draw.device)
    return (positions >= start[:, None]) & (positions < start[:, None] + length)


_APPLY = {"color": _color, "translation": _translation, "cutout": _cutout}
