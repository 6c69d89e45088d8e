"""Edge maps of pictures (Canny 1986), as a tokenizer or a condition takes them.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIGMA = 1.0
"""Of the Gaussian that goes first, in pixels."""
LOW, HIGH = 0.03, 0.08
"""Slopes in luminance, of [0, 1], per pixel: an edge starts from HIGH on and goes on from LOW on."""


def canny(images: Tensor) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1] -> edges (B, 1, H, W) float32, 1 on an edge and -1 elsewhere.

    Canny's steps on the luminance (BT.601 of three channels or the first three; the mean of any other count):
    Gaussian, Sobel slopes, only the ridge of the slope across each edge, and hysteresis between LOW and HIGH.
    A function of the picture alone. Raises ValueError for pictures of fewer than two pixels a side.
    """
    if images.ndim != 4 or min(images.shape[2:]) < 2:
        raise ValueError(
            f"edges need pictures (B, C, H, W) of at least 2x2 pixels, not {tuple(images.shape)}"
        )
    with torch.autocast(images.device.type, enabled=False):
        slope_y, slope_x = _slopes(_smooth((_luminance(images.float()) + 1) / 2))
        strength = torch.hypot(slope_y, slope_x)
        ridge = _is_ridge(strength, slope_y, slope_x)
        weak, strong = ridge & (strength >= LOW), ridge & (strength >= HIGH)
        return _connected(strong, weak).float() * 2 - 1


def _luminance(images: Tensor) -> Tensor:
    if images.shape[1] in (3, 4):
        weights = images.new_tensor([0.299, 0.587, 0.114])
        return (images[:, :3] * weights[:, None, None]).sum(1, keepdim=True)
    return images.mean(1, keepdim=True)


def _smooth(grey: Tensor) -> Tensor:
    radius = math.ceil(3 * SIGMA)
    places = torch.arange(-radius, radius + 1, device=grey.device, dtype=grey.dtype)
    kernel = torch.exp(-0.5 * (places / SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    grey = F.pad(grey, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(grey, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))


def _slopes(grey: Tensor) -> tuple[Tensor, Tensor]:
    """Change per pixel along y and x, (B, 1, H, W) each."""
    sobel = grey.new_tensor([[-1, -2, -1], [0, 0, 0], [1, 2, 1]]) / 8
    both = F.conv2d(F.pad(grey, (1,) * 4, mode="replicate"), torch.stack((sobel, sobel.t()))[:, None])
    return both[:, :1], both[:, 1:]


def _is_ridge(strength: Tensor, slope_y: Tensor, slope_x: Tensor) -> Tensor:
    """Whether the slope is largest among itself and its two neighbours in its own direction."""
    height, width = strength.shape[2:]
    padded = F.pad(strength, (1,) * 4)

    def shifted(dy: int, dx: int) -> Tensor:
        return padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    # Four directions, each of 45 degrees; a ridge of two equal pixels keeps the first.
    angle = torch.atan2(slope_y, slope_x) % math.pi
    sector = (angle / (math.pi / 4)).round().long() % 4
    ridge = torch.zeros_like(strength, dtype=torch.bool)
    for number, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        peak = (strength > shifted(-dy, -dx)) & (strength >= shifted(dy, dx))
        ridge |= (sector == number) & peak
    return ridge


def _connected(strong: Tensor, weak: Tensor) -> Tensor:
    """Weak pixels that reach a strong one over weak pixels, along rows, columns and diagonals.

    Both (B, 1, H, W) bool, strong ones being weak too. The pixels of each connected piece find their least
    number by FastSV (Zhang et al. 2020), in a few rounds however long the piece is.
    """
    number = torch.full(weak.shape, -1, dtype=torch.int64, device=weak.device)
    number[weak] = torch.arange(int(weak.sum()), device=weak.device)
    first, second = _neighbours(number)
    parent = torch.arange(int(number.max()) + 1, device=weak.device)
    while True:
        grand = parent[parent]
        low = torch.minimum(grand[first], grand[second])
        lower = grand.clone()
        for place in (first, second, parent[first], parent[second]):
            lower.scatter_reduce_(0, place, low, "amin")
        if torch.equal(lower, parent):
            break
        parent = lower
    reached = torch.zeros_like(parent, dtype=torch.bool)
    reached[parent[strong[weak]]] = True
    edges = torch.zeros_like(weak)
    edges[weak] = reached[parent]
    return edges


def _neighbours(number: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (n,), (n,) of numbers that are not negative and touch, of (B, 1, H, W)."""
    height, width = number.shape[2:]
    pairs = []
    for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = number[..., : height - dy, max(0, -dx) : width - max(0, dx)]
        there = number[..., dy:, max(0, dx) : width - max(0, -dx)]
        both = (here >= 0) & (there >= 0)
        pairs.append((here[both], there[both]))
    return torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
