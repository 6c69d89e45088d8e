"""Matrices of 8-bit whole numbers with one scale an output channel.

w[n, k] ~ scale[n] * q[n, k], q in -127 ... 127, scale[n] = max |w[n]| / 127: weight-only, symmetric and
without calibration (the "vector-wise" scheme of Dettmers et al. 2022, arXiv:2208.07339, for weights alone).
Inputs and sums are bf16 and fp32. A step of decoding then reads a quarter of fp32's bytes.

Axes: N output channels, K input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

LARGEST = 127
_MOST_ROWS = 16
"""From more rows on the matrix is widened once and multiplied as a bf16 one."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) -> whole numbers (N, K) int8 and scales (N,) fp32; a row of zeros has the scale 1."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale[:, None]).round().to(torch.int8), scale


def dequantize_rows(numbers: Tensor, scale: Tensor) -> Tensor:
    """The matrix (N, K) fp32 that whole numbers (N, K) and scales (N,) stand for."""
    return numbers.float() * scale[:, None]


class Int8Linear(nn.Module):
    """A Linear for inference on a CPU, from bf16 (..., K) to bf16 (..., N), with its matrix in 8 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        numbers, scale = quantize_rows(linear.weight)
        # Plain attributes: made for sampling, never saved.
        self.numbers, self.scale = numbers.contiguous(), scale.to(torch.bfloat16)
        self.bias = None if linear.bias is None else linear.bias.detach().to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim > 2:
            flat: Tensor = self(x.flatten(0, -2))
            return flat.view(*x.shape[:-1], -1)
        if len(x) > _MOST_ROWS:
            out = functional.linear(x, self.numbers.to(x.dtype)).mul_(self.scale)
        else:
            out = torch._weight_int8pack_mm(x, self.numbers, self.scale)
        return out if self.bias is None else out.add_(self.bias)


def can_read_int8(device: torch.device, linear: nn.Linear) -> bool:
    """Whether this build of torch multiplies by this Linear's matrix in 8 bits, on this device.

    torch's kernel reads past the end of rows whose length is no multiple of its vectors, without a check.
    """
    has_kernel = device.type == "cpu" and hasattr(torch, "_weight_int8pack_mm")
    return has_kernel and linear.in_features % 32 == 0
