"""Label maps as pictures to look at."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor


def paint_labels(segmentation: Tensor) -> Tensor:
    """Labels (B, H, W) int64 -> a fixed colour each, (B, 3, H, W) in [-1, 1].

    Hues go round by the golden ratio, so that neighbouring labels are easy to tell apart.
    """
    count = int(segmentation.max()) + 1
    hues = [(0.61 + label * 0.618033988749895) % 1 for label in range(count)]
    colours = [
        colorsys.hsv_to_rgb(hue, 0.6 + 0.3 * (n % 2), 0.95 - 0.25 * (n % 3)) for n, hue in enumerate(hues)
    ]
    table = torch.tensor(colours) * 2 - 1
    return table[segmentation.cpu()].permute(0, 3, 1, 2)
