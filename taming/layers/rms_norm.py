"""Root-mean-square normalisation that is also quick on a CPU.

y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv:1910.07467). torch
has a fused kernel for GPUs only; on a CPU its chain of elementwise operations takes five times as long as
LayerNorm. Here both passes are written out: two passes over x forward, four backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RMSNorm(nn.Module):
    """Normalises (..., width) in the dtype of its input; the mean is taken in fp32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            if not torch.is_grad_enabled():
                return _normalised(x, self.weight, self.eps)[0]
            result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return result
        return functional.rms_norm(x, (self.width,), self.weight.to(x.dtype), self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        width = x.shape[-1]
        # dx = rstd w g - x rstd^3 mean(w g x); dw = sum over rows of rstd g x.
        product = (grad * x).reshape(-1, width)
        rows = rstd.reshape(-1, 1)
        along = (product @ weight.to(x.dtype)[:, None]).float()
        grad_weight = (rows.to(x.dtype).t() @ product).view(width).to(weight.dtype)
        pull = (rows.pow(3) * along / width).to(x.dtype).view(rstd.shape)
        grad_x = (grad * weight.to(x.dtype)).mul_(rstd.to(x.dtype)).addcmul_(x, pull, value=-1)
        return grad_x, grad_weight, None


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What comes out, (..., width), and the reciprocal of the root mean square, (..., 1) fp32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * rstd.to(x.dtype)).mul_(weight.to(x.dtype)), rstd
