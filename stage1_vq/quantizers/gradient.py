"""How a gradient passes a choice of codes, and how codes and latents are drawn together.

Axes: N latents, D code width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

GradientKind = Literal["straight_through", "rotation"]


def pass_gradient(latents: Tensor, codes: Tensor, kind: GradientKind) -> Tensor:
    """`codes` (N, D) as they are, whose gradient reaches only `latents` (N, D), in the way of `kind`."""
    if kind == "rotation":
        moved = rotate(latents, codes.detach())
        return _StraightThrough.apply(moved, codes.detach())
    return _StraightThrough.apply(latents, codes.detach())


def rotate(latents: Tensor, codes: Tensor) -> Tensor:
    """Latents (N, D) carried onto their codes by a rotation and a scaling that count as constants.

    z -> (|q| / |z|) (z - 2 r (r.z) + 2 q^ (z^.z)) with r = (z^ + q^) / |z^ + q^|, and z^, q^ of length one:
    the gradient keeps its angle to the code (Fifty et al. 2024, arXiv:2410.06424, 4.2).
    """
    with torch.no_grad():
        scale = codes.norm(dim=1, keepdim=True) / latents.norm(dim=1, keepdim=True).clamp(min=1e-6)
        before, after = F.normalize(latents, dim=1), F.normalize(codes, dim=1)
        between = F.normalize(before + after, dim=1)
    along = (latents * between).sum(1, keepdim=True)
    length = (latents * before).sum(1, keepdim=True)
    return scale * (latents - 2 * along * between + 2 * length * after)


def attraction(
    latents: Tensor, codes: Tensor, commitment: float, codebook: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """commitment * mean |z - sg(q)|^2 + codebook * mean |sg(z) - q|^2 of rows (N, D), as one ().

    Beside it the log's term: the mean squared error, unweighted.
    """
    loss, error = _Attraction.apply(latents, codes, commitment, codebook)
    return loss, {"commitment": error}


class _StraightThrough(Function):
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, codes: Tensor) -> Tensor:
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Attraction(Function):
    """Both squared errors from one difference: at small codebooks each further pass counts."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, codes: Tensor, commitment: float, codebook: float
    ) -> tuple[Tensor, Tensor]:
        difference = latents - codes
        ctx.save_for_backward(difference)
        ctx.weights = commitment, codebook
        flat = difference.flatten()
        error = torch.dot(flat, flat) / flat.numel()
        ctx.mark_non_differentiable(error)
        return error * (commitment + codebook), error

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (difference,) = ctx.saved_tensors
        commitment, codebook = ctx.weights
        step = grads[0] * (2 / difference.numel())
        latents = difference * (step * commitment) if ctx.needs_input_grad[0] else None
        codes = difference * (step * -codebook) if ctx.needs_input_grad[1] else None
        return latents, codes, None, None
