"""Whether pictures that were written piece by piece show where the pieces meet.

A seam is a place where colours jump more than they do around it. Pictures jump at objects and in textures
too, and decoders at the borders of their cells: so a border is compared with places nearby that lie a whole
number of cells off, and with the same figure of real pictures.

Axes: B pictures, C channels, H W pixels, n places along one axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor

Axis = Literal["columns", "rows"]


@dataclass(frozen=True)
class SeamFigure:
    """Jumps at borders relative to those nearby."""

    ratio: float
    """1 where nothing is to be seen."""
    error: float
    """Standard error of the ratio over pictures, by the jackknife; nan of a single picture."""


def colour_jumps(images: Tensor, axis: Axis) -> Tensor:
    """Mean absolute difference of neighbours: (B, C, H, W) -> (B, W - 1), or (B, H - 1) of rows.

    Entry x - 1 belongs to the border before column (or row) x.
    """
    images = images.float()
    if axis == "columns":
        return reduce((images[..., 1:] - images[..., :-1]).abs(), "b c h w -> b w", "mean")
    return reduce((images[..., 1:, :] - images[..., :-1, :]).abs(), "b c h w -> b h", "mean")


def seam_figure(
    images: Tensor,
    *,
    columns: Sequence[int] = (),
    rows: Sequence[int] = (),
    step: int = 1,
    reference: Tensor | None = None,
) -> SeamFigure:
    """The jump at borders over the mean jump nearby, pictures (B, C, H, W).

    A border x lies before column (or row) x, 0 < x < W. Nearby are the places that lie a multiple of `step`
    from it, less far than half of the least distance between borders (of four steps where there is one
    only), and are no borders themselves. Give the downsample factor as `step`, so that cells are compared
    with cells. Both sums, over borders and pictures, are taken before they are divided.

    Where objects happen to end matters more than most seams. `reference` (B, C, H, W) are pictures of the
    same things, the real ones of the label maps that samples were made from: what their jumps at borders
    exceed those nearby by is taken off before the division, and the error is smaller.
    Raises ValueError without a border, and for one that is outside or has no place to compare with.
    """
    jumps, near = _jumps_at(images, columns, rows, step)
    jumps_of_reference, near_of_reference = jumps.new_ones(len(jumps)), jumps.new_ones(len(jumps))
    if reference is not None:
        jumps_of_reference, near_of_reference = _jumps_at(reference, columns, rows, step)
    sums = torch.stack((jumps, near, jumps_of_reference, near_of_reference))  # (4, B)
    total = sums.sum(dim=1, keepdim=True)
    count = len(images)
    ratio = float(_relative(total))
    if count == 1:
        return SeamFigure(ratio, float("nan"))
    without = _relative(total - sums)  # (B,)
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return SeamFigure(ratio, float(error))


def periodicity(images: Tensor, period: int, axis: Axis, *, step: int = 1) -> float:
    """Whether jumps repeat with a period of some pixels, wherever they lie: about 1 where they do not.

    The F of a one-way analysis of variance: logarithms of jumps at multiples of `step`, each less the mean
    over one period around it, grouped by their place within the period; the variance between groups over
    that within. Raises ValueError for a period that is no multiple of `step`, of two steps at least, or
    that fits the pictures less than twice.
    """
    jumps = colour_jumps(images, axis)
    length = jumps.shape[1] + 1
    if period % step or period < 2 * step or 2 * period > length:
        raise ValueError(
            f"period {period} is not a multiple of step {step}, from {2 * step} to half of {length} pixels"
        )
    logs = jumps[:, step - 1 :: step].clamp(min=1e-6).log()  # borders step, 2 step, ...
    groups = period // step
    window = logs.unfold(1, groups, 1).mean(-1)  # (B, n - groups + 1)
    first = groups // 2
    flat = logs[:, first : first + window.shape[1]] - window
    usable = flat.shape[1] // groups * groups  # as many of each group
    values = rearrange(flat[:, :usable].double(), "b (n g) -> g (b n)", g=groups)
    means = values.mean(dim=1, keepdim=True)
    if values.shape[1] < 2:
        raise ValueError(f"period {period} fits too rarely; give more or larger pictures")
    between = values.shape[1] * (means - means.mean()).square().sum() / (groups - 1)
    within = (values - means).square().sum() / (values.numel() - groups)
    return float(between / within.clamp(min=1e-12))


def _jumps_at(
    images: Tensor, columns: Sequence[int], rows: Sequence[int], step: int
) -> tuple[Tensor, Tensor]:
    """Jumps at all borders, and the means of those nearby, summed over borders: (B,) each."""
    at_borders, nearby = [], []
    sides: tuple[tuple[Axis, Sequence[int]], ...] = (("columns", columns), ("rows", rows))
    for axis, borders in sides:
        jumps = colour_jumps(images, axis)
        for border, places in _neighbours(borders, jumps.shape[1] + 1, step, axis).items():
            at_borders.append(jumps[:, border - 1])
            nearby.append(jumps[:, [place - 1 for place in places]].mean(dim=1))
    if not at_borders:
        raise ValueError("give at least one border, among columns or rows")
    return torch.stack(at_borders).sum(0).double(), torch.stack(nearby).sum(0).double()


def _relative(sums: Tensor) -> Tensor:
    """(4, n) -> (n,): 1 + (excess - excess of the reference) / nearby.

    Differences, for an object's edge is as high in both, while one may have more texture everywhere: a
    quotient of quotients would take that for the lack of a seam.
    """
    above, below, above_of_reference, below_of_reference = sums
    return 1 + (above - below - above_of_reference + below_of_reference) / below


def _neighbours(borders: Sequence[int], length: int, step: int, axis: Axis) -> dict[int, list[int]]:
    """Border -> the places that it is compared with."""
    ordered = sorted(set(borders))
    gaps = [after - before for before, after in pairwise(ordered)]
    reach = min(gaps) / 2 if gaps else 4 * step + 1
    found = {}
    for border in ordered:
        if not 0 < border < length:
            raise ValueError(f"border {border} of {axis} is not between 1 and {length - 1}")
        places = [
            place
            for place in range(border % step, length, step)
            if place > 0 and abs(place - border) < reach and place not in ordered
        ]
        if not places:
            raise ValueError(
                f"border {border} of {axis} has nothing to compare with: borders are {reach * 2:g} pixels "
                f"apart, and cells {step}"
            )
        found[border] = places
    return found
