"""How far the small patches of two sets of pictures are apart, at every scale (Karras et al. 2018,
arXiv:1710.10196, section 5).

Patches are taken from each band of a Laplacian pyramid: the finest tells of noise and sharpness, the coarsest
of the picture's layout. What a feature network overlooks, they do not.

Axes: N pictures, C channels, H W pixels, P patches, D numbers of a patch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from taming.data.picture import to_uint8
from taming.errors import UserError

PATCH, PATCHES_A_PICTURE, SMALLEST_BAND = 7, 64, 16
DIRECTIONS, MOST_PICTURES = 128, 2048
_KERNEL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


class SlicedWasserstein:
    """Distances of generated to real pictures of `size` (H, W), a band of the pyramid at a time.

    As published: 7x7 pixels of each picture and band, in each channel of mean 0 and deviation 1 over the set;
    the 1-Wasserstein distance along random directions, times 1000. Ours are 64 patches of each of the first
    2048 pictures and 128 directions, for 128 of 16384 and 512: seconds in place of an hour. The places and
    the directions are the same in every evaluation. Pictures are in [-1, 1], and rounded to 8 bits.
    Sets of real pictures are not 0 apart: on the scenes at 32 px the mean is about 22 of 256 pictures and 11
    of 1000, where of 256 a 3x3 blur makes 39 and one class alone 125.
    """

    def __init__(self, size: tuple[int, int], channels: int = 3) -> None:
        """Raises UserError of pictures that are smaller than a patch's band."""
        if min(size) < PATCH:
            raise UserError(
                f"pictures of {size[0]}x{size[1]} are smaller than the patches of {PATCH}x{PATCH} pixels "
                "that a sliced Wasserstein distance compares"
            )
        self.channels, self.bands = channels, [size]
        while min(self.bands[-1]) // 2 >= SMALLEST_BAND and all(side % 2 == 0 for side in self.bands[-1]):
            self.bands.append((self.bands[-1][0] // 2, self.bands[-1][1] // 2))
        self._real: list[list[Tensor]] = [[] for _ in self.bands]
        self._generated: list[list[Tensor]] = [[] for _ in self.bands]
        self._random = [np.random.Generator(np.random.Philox(key=side)) for side in (1, 2)]

    def add_real(self, images: Tensor) -> None:
        """Count (B, C, H, W) in [-1, 1]; of more than 2048 in all, the first."""
        self._add(images, self._real, self._random[0])

    def add_generated(self, images: Tensor) -> None:
        """As `add_real`."""
        self._add(images, self._generated, self._random[1])

    def value(self) -> dict[str, float]:
        """ "16", "32", ...: the band of that height -> its distance; "mean" of all of them."""
        figures = {}
        for (height, _), real, generated in zip(self.bands, self._real, self._generated, strict=True):
            if not real or not generated:
                raise UserError("a sliced Wasserstein distance needs pictures of both sets")
            figures[str(height)] = 1000 * _distance(
                _normalised(torch.cat(real)), _normalised(torch.cat(generated))
            )
        return {**figures, "mean": sum(figures.values()) / len(figures)}

    def _add(self, images: Tensor, to: list[list[Tensor]], random: np.random.Generator) -> None:
        counted = sum(map(len, to[0])) // PATCHES_A_PICTURE
        images = images[: max(MOST_PICTURES - counted, 0)]
        if not len(images):
            return
        x = to_uint8(images).cpu().float()
        for place in range(len(self.bands)):
            low = _halved(x) if place + 1 < len(self.bands) else None
            band = x if low is None else x - _doubled(low)
            to[place].append(_patches(band, random))
            if low is not None:
                x = low


def _patches(band: Tensor, random: np.random.Generator) -> Tensor:
    """(N, C, H, W) -> (N * 64, C, 7 * 7) at random places, each picture's own."""
    num, _, height, width = band.shape
    shape = (num, PATCHES_A_PICTURE, 1, 1)
    top = torch.from_numpy(random.integers(0, height - PATCH + 1, shape))
    left = torch.from_numpy(random.integers(0, width - PATCH + 1, shape))
    offsets = torch.arange(PATCH)
    picture = torch.arange(num)[:, None, None, None]
    # Advanced indices around the channels' slice come first: (N, 64, 7, 7, C).
    found = band[picture, :, top + offsets[:, None], left + offsets[None, :]]
    return found.flatten(0, 1).permute(0, 3, 1, 2).flatten(2)


def _normalised(patches: Tensor) -> Tensor:
    """(P, C, 49) -> (P, D), each channel of mean 0 and deviation 1."""
    mean, deviation = patches.mean((0, 2), keepdim=True), patches.std((0, 2), keepdim=True)
    return ((patches - mean) / deviation.clamp(min=1e-6)).flatten(1)


def _distance(real: Tensor, generated: Tensor) -> float:
    """Mean over directions of the 1-Wasserstein distance of the two sets' projections."""
    random = np.random.Generator(np.random.Philox(key=3))
    directions = torch.from_numpy(random.standard_normal((real.shape[1], DIRECTIONS))).float()
    directions /= directions.norm(dim=0)
    count = min(len(real), len(generated))
    total = 0.0
    for part in directions.split(32, dim=1):
        a, b = (_quantiles(patches @ part, count) for patches in (real, generated))
        total += float((a - b).abs().mean(0).sum())
    return total / DIRECTIONS


def _quantiles(values: Tensor, count: int) -> Tensor:
    """(P, M) -> (count, M) in rising order: all values, or as many evenly spaced ones."""
    ranked = values.sort(dim=0).values
    if len(ranked) == count:
        return ranked
    return ranked[((torch.arange(count) + 0.5) * len(ranked) / count).long()]


def _halved(x: Tensor) -> Tensor:
    return _blurred(x, 1.0)[..., ::2, ::2]


def _doubled(x: Tensor) -> Tensor:
    spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[..., ::2, ::2] = x
    return _blurred(spread, 4.0)


def _blurred(x: Tensor, gain: float) -> Tensor:
    kernel = (gain * torch.outer(_KERNEL, _KERNEL)).expand(x.shape[1], 1, -1, -1)
    return functional.conv2d(functional.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, groups=x.shape[1])
