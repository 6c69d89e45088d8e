"""Convolutions that keep only what cannot be recomputed cheaply.

A convolution keeps its input for the backward pass. Where that input is a cheap function of a tensor that is
kept anyway (normalise and SiLU, nearest upsampling, padding), keeping it as well doubles the memory of a
network; recomputing it costs a few per cent of time. Memory for time as in Chen et al. 2016
(arXiv:1604.06174), at the grain where it is nearly free.

Axes: B pictures, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taming.layers.norm import affine_of, group_norm_silu, norm_backward, norm_forward

Preparation = Literal["norm_silu", "upsample", "pad"]


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d, *, recompute: bool = True) -> Tensor:
    """conv(silu(norm(x))), (B, C, H, W) -> (B, C', H, W); with `recompute` only x is kept for backward."""
    if recompute and torch.is_grad_enabled():
        return _conv(x, "norm_silu", norm, conv)
    result: Tensor = conv(group_norm_silu(x, norm, recompute=recompute))
    return result


def upsample_conv(x: Tensor, conv: nn.Conv2d, *, recompute: bool = True) -> Tensor:
    """Nearest x2, then `conv`: (B, C, H, W) -> (B, C', 2H, 2W)."""
    if recompute and torch.is_grad_enabled():
        return _conv(x, "upsample", None, conv)
    result: Tensor = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return result


def pad_conv(x: Tensor, conv: nn.Conv2d, *, recompute: bool = True) -> Tensor:
    """One row below and one column right of zeros, then `conv`: the published downsampling."""
    if recompute and torch.is_grad_enabled():
        return _conv(x, "pad", None, conv)
    result: Tensor = conv(F.pad(x, (0, 1, 0, 1)))
    return result


def _conv(x: Tensor, preparation: Preparation, norm: nn.GroupNorm | None, conv: nn.Conv2d) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        # Outside of the Function, so that the gradients return through the casts in full precision.
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = _RecomputedConv.apply(
        x,
        norm.weight if norm is not None else None,
        norm.bias if norm is not None else None,
        conv.weight.to(x.dtype),
        conv.bias.to(x.dtype) if conv.bias is not None else None,
        preparation,
        (norm.num_groups, norm.eps) if norm is not None else (1, 0.0),
        conv.stride,
        conv.padding,
    )
    return result


class _RecomputedConv(torch.autograd.Function):
    """A convolution of a prepared input which is made again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        preparation: Preparation,
        norm: tuple[int, float],
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        ctx.preparation, ctx.norm, ctx.stride, ctx.padding = preparation, norm, stride, padding
        ctx.has_bias = bias is not None
        mean = rstd = None
        if preparation == "norm_silu":
            assert norm_weight is not None
            assert norm_bias is not None
            prepared, mean, rstd = norm_forward(x, norm_weight, norm_bias, *norm)
            F.silu(prepared, inplace=True)
        else:
            prepared = _resized(x, preparation)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(prepared, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd = ctx.saved_tensors
        normalised = None
        if ctx.preparation == "norm_silu":
            normalised = affine_of(x, norm_weight, norm_bias, mean, rstd)
            prepared = F.silu(normalised)
        else:
            prepared = _resized(x, ctx.preparation)
        needs = (ctx.needs_input_grad[0] or normalised is not None, True, ctx.has_bias)
        grad_prepared, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            prepared,
            weight,
            [weight.shape[0]] if ctx.has_bias else None,
            ctx.stride,
            ctx.padding,
            (1, 1),
            False,
            (0, 0),
            1,
            needs,
        )
        del prepared
        grad_x = grad_norm_weight = grad_norm_bias = None
        if normalised is not None:
            # In place: a fresh large tensor costs more than the arithmetic (page faults).
            grad_norm = torch.ops.aten.silu_backward.grad_input(
                grad_prepared, normalised, grad_input=grad_prepared
            )
            del normalised
            grad_x, grad_norm_weight, grad_norm_bias = norm_backward(
                grad_norm, x, norm_weight, mean, rstd, ctx.norm[0]
            )
        elif grad_prepared is not None and ctx.preparation == "pad":
            grad_x = grad_prepared[..., :-1, :-1]
        elif grad_prepared is not None:
            grad_x = torch.ops.aten.upsample_nearest2d_backward(
                grad_prepared, prepared_size(x), list(x.shape), 2.0, 2.0
            )
        return grad_x, grad_norm_weight, grad_norm_bias, grad_weight, grad_bias, None, None, None, None


def prepared_size(x: Tensor) -> list[int]:
    """Rows and columns of `x` upsampled by two."""
    return [2 * x.shape[-2], 2 * x.shape[-1]]


def _resized(x: Tensor, preparation: Preparation) -> Tensor:
    if preparation == "pad":
        return F.pad(x, (0, 1, 0, 1))
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
