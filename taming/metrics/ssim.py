"""Structural similarity (Wang et al. 2004, "Image quality assessment: from error visibility to structural
similarity", IEEE TIP 13).

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(images: Tensor, target: Tensor) -> Tensor:
    """(B,) similarity of pictures (B, C, H, W) in [-1, 1], at most 1; H and W at least 11.

    The paper's constants on values in [0, 1]: Gaussian windows of 11x11 pixels with a deviation of 1.5, K1 =
    0.01, K2 = 0.03; every channel by itself, only windows that lie wholly within the picture, population
    variances (the weights sum to one). Raises ValueError for smaller pictures.
    """
    if min(images.shape[2:]) < WINDOW:
        raise ValueError(f"ssim needs pictures of at least {WINDOW}x{WINDOW}, not {tuple(images.shape[2:])}")
    x, y = ((t.float().clamp(-1, 1) + 1) / 2 for t in (images, target))
    mean_x, mean_y, xx, yy, xy = _blur(torch.cat((x, y, x * x, y * y, x * y))).chunk(5)
    variance_x, variance_y = xx - mean_x**2, yy - mean_y**2
    covariance = xy - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(1)


def _blur(maps: Tensor) -> Tensor:
    """Gaussian means of the windows that lie within (N, C, H, W): (N, C, H - 10, W - 10).

    As sums of shifted maps: on a CPU six times as fast as a convolution of one channel.
    """
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    kernel = torch.exp(-0.5 * (places / SIGMA) ** 2)
    weights = (kernel / kernel.sum()).tolist()
    for axis in (2, 3):
        length = maps.shape[axis] - WINDOW + 1
        total = maps.narrow(axis, 0, length) * weights[0]
        for shift, weight in enumerate(weights[1:], 1):
            total.add_(maps.narrow(axis, shift, length), alpha=weight)
        maps = total
    return maps
