"""Painting with a generator: noise that is its own for every picture, classes, and ways between pictures.

Axes: N pictures, Z noise, C channels, H W pixels.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taming.errors import UserError
from taming.gan.generator import Generator, StemOutput
from taming.gan.noise import draw_noise

Classes = int | str | Sequence[int | str]
"""A class for all pictures, or one for each: numbers or names."""
Progress = Callable[[int, int], None]


def sample_noise(num: int, dim: int, *, seed: int, first: int = 0, truncation: float | None = None) -> Tensor:
    """z of the pictures from number `first` on: (num, dim) fp32 on the CPU; row i is a function of
    (seed, first + i) alone.

    With `truncation` t its coordinates are of a normal that is truncated to [-t, t] (Brock et al. 2019,
    arXiv:1809.11096, section 3.1): less varied pictures, each more like the average one. They are the same
    draws mapped through the two distributions, in place of drawn again, so that a picture changes gradually
    with t and is the untruncated one for large t. Raises UserError for t that is not above 0.
    """
    z = draw_noise(num, dim, seed=seed, first=first)
    if truncation is None or truncation == math.inf:
        return z
    if not truncation > 0:
        raise UserError(
            f"truncation {truncation} is not above 0; typical are 0.5 to 2, None for no truncation"
        )
    below = torch.special.ndtr(torch.tensor(-truncation, dtype=torch.float64))
    share = torch.special.ndtr(z.double())
    truncated = torch.special.ndtri(below + share * (1 - 2 * below)).clamp(-truncation, truncation)
    return truncated.float()


def choose_classes(
    num: int, classes: Classes | None, *, num_classes: int | None, names: Sequence[str] = ()
) -> Tensor | None:
    """Class of each of `num` pictures, (num,) int64; None for a model without classes.

    One class holds for all; without any they are spread evenly: picture i has class i mod `num_classes`.
    Raises UserError for classes that the model does not have, and for another number of them.
    """
    if num_classes is None:
        if classes is not None:
            raise UserError("this model was trained without classes; leave the class out")
        return None
    if classes is None:
        return torch.arange(num) % num_classes
    asked = [classes] if isinstance(classes, int | str) else list(classes)
    if len(asked) not in (1, num):
        raise UserError(
            f"{len(asked)} classes were given for {num} pictures; give one for all, or one for each"
        )
    found = [class_number(name, num_classes=num_classes, names=names) for name in asked]
    return torch.tensor(found * num if len(found) == 1 else found)


def class_number(asked: int | str, *, num_classes: int, names: Sequence[str] = ()) -> int:
    """The number of a class that is given by its name or number. Raises UserError."""
    if isinstance(asked, str) and asked in names:
        return list(names).index(asked)
    text = str(asked)
    if text.isdecimal() and int(text) < num_classes:
        return int(text)
    near = difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    known = f"classes are {shown}, or their numbers" if names else "classes are numbers"
    raise UserError(f"no class {text!r}: {hint}{known} 0 to {num_classes - 1}")


@torch.no_grad()
def paint(
    generator: Generator,
    z: Tensor,
    classes: Tensor | None = None,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Noise (N, Z) and classes (N,) -> pictures (N, C, H, W) in [-1, 1] on the CPU, fp32.

    The generator paints as it does in use (eval mode), whatever its mode is, and is left as it was.
    """

    def part(rows: slice) -> Tensor:
        y = None if classes is None else classes[rows].to(_device(generator))
        images: Tensor = generator(z[rows].to(_device(generator)), y)
        return images

    return _in_batches(generator, part, len(z), batch_size, progress)


@torch.no_grad()
def paint_between(
    generator: Generator,
    z: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    shares: Tensor,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """As `paint`, with picture i at `shares[i]` in [0, 1] of the way from class start[i] to end[i].

    Between classes stands what the stem makes of them, map and style: all that the rest of a generator
    knows of a class.
    """

    def part(rows: slice) -> Tensor:
        place = _device(generator)
        noise, share = z[rows].to(place), shares[rows].to(place)
        ends = [generator.stem(noise, None if y is None else y[rows].to(place)) for y in (start, end)]
        features, style = _mixed(ends[0], ends[1], share)
        images: Tensor = generator.trunk(features, style).images
        return images

    return _in_batches(generator, part, len(z), batch_size, progress)


def slerp(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Along the great circle from `start` to `end` (Z,), at `shares` (N,) in [0, 1]: (N, Z).

    Between two draws of a normal of many dimensions, the straight line passes far closer to the origin than
    any draw lies; the arc keeps the lengths (White 2016, arXiv:1609.04468).
    """
    cosine = torch.nn.functional.cosine_similarity(start.double(), end.double(), dim=0).clamp(-1, 1)
    angle = torch.acos(cosine)
    share = shares.double()[:, None]
    if angle < 1e-6 or math.pi - angle < 1e-6:  # no arc, or none that is shorter than the others
        return torch.lerp(start.double()[None], end.double()[None], share).float()
    weights = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return ((weights[0] * start + weights[1] * end) / torch.sin(angle)).float()


@contextmanager
def in_use(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; each of its parts is in its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _in_batches(
    generator: Generator,
    part: Callable[[slice], Tensor],
    num: int,
    batch_size: int,
    progress: Progress | None,
) -> Tensor:
    if num < 1:
        raise UserError(f"{num} pictures cannot be painted; ask for one or more")
    images = []
    with in_use(generator):
        for first in range(0, num, batch_size):
            images.append(part(slice(first, first + batch_size)).float().clamp(-1, 1).cpu())
            if progress is not None:
                progress(min(first + batch_size, num), num)
    return torch.cat(images)


def _mixed(start: StemOutput, end: StemOutput, share: Tensor) -> tuple[Tensor, Tensor | None]:
    features = torch.lerp(start.features, end.features, share[:, None, None, None])
    if start.style is None or end.style is None:
        return features, None
    return features, torch.lerp(start.style, end.style, share[:, None])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
