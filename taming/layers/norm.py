"""Group normalisation followed by SiLU as one operation that keeps only its input.

y = silu((x - mean) * rstd * weight + bias), mean and rstd over each group of channels (Wu and He 2018,
arXiv:1803.08494). Autograd would keep the normalised tensor for SiLU besides x; here it is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taming.errors import ConfigError


def group_norm(channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """The published normalisation: eps 1e-6, affine. Raises ConfigError if the groups do not divide."""
    if channels % num_groups:
        raise ConfigError(
            f"norm_num_groups {num_groups} does not divide a layer of {channels} channels; "
            "choose channels that are its multiples, or fewer groups"
        )
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


def group_norm_silu(x: Tensor, norm: nn.GroupNorm, *, recompute: bool = True) -> Tensor:
    """silu(norm(x)) for x (B, C, H, W), in the dtype of x; with `recompute` only x is kept."""
    if recompute and torch.is_grad_enabled():
        result: Tensor = _GroupNormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return result
    normalised, _, _ = norm_forward(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return F.silu(normalised)


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        normalised, mean, rstd = norm_forward(x, weight, bias, num_groups, eps)
        ctx.num_groups = num_groups
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return F.silu(normalised, inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad_norm = torch.ops.aten.silu_backward(grad, affine_of(x, weight, bias, mean, rstd))
        return *norm_backward(grad_norm, x, weight, mean, rstd, ctx.num_groups), None, None


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised in the dtype of x, mean, rstd), the last two (B, groups)."""
    batch, channels, height, width = x.shape
    x = _dense(x)
    if x.device.type != "cpu" and x.dtype != weight.dtype:
        # Only the CPU kernel takes half-precision pictures with full-precision weights.
        normalised, mean, rstd = torch.native_group_norm(
            x.to(weight.dtype), weight, bias, batch, channels, height * width, num_groups, eps
        )
        return normalised.to(x.dtype), mean, rstd
    return torch.native_group_norm(x, weight, bias, batch, channels, height * width, num_groups, eps)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from the gradient of the normalised tensor."""
    batch, channels, height, width = x.shape
    dtype = x.dtype
    x = _dense(x)
    if x.device.type != "cpu" and dtype != weight.dtype:
        x, grad = x.to(weight.dtype), grad.to(weight.dtype)
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad.contiguous(memory_format=layout),
        x,
        mean,
        rstd,
        weight,
        batch,
        channels,
        height * width,
        num_groups,
        (True, True, True),
    )
    return grad_x.to(dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def affine_of(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The normalised tensor again, from the statistics that forward found, in the dtype of x."""
    per_group = weight.shape[0] // mean.shape[1]
    scale = rstd.to(weight.dtype).repeat_interleave(per_group, 1) * weight
    shift = bias - mean.to(weight.dtype).repeat_interleave(per_group, 1) * scale
    scale, shift = scale[..., None, None], shift[..., None, None]
    if x.dtype == scale.dtype:
        return torch.addcmul(shift, x, scale)
    return (x * scale + shift).to(x.dtype)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
