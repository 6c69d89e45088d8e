"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, target: Tensor) -> Tensor:
    """(B,) dB of each picture of (B, C, H, W) in [-1, 1]: 10 log10(4 / mean squared error); at most 100."""
    error = (images.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=4e-10))
