"""How good a reconstruction is, and the balance between its two judges.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.config import LossConfig
from taming.collective import mean_over_processes

MAX_ADAPTIVE_WEIGHT = 1e4


class ReconstructionLoss(NamedTuple):
    total: Tensor
    """(), the weighted sum (the paper's nll)."""
    terms: dict[str, Tensor]
    """Detached () values: rec, and perceptual where it is on; unweighted."""


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, config: LossConfig, perceptual: nn.Module | None
) -> ReconstructionLoss:
    """pixel_weight * |x - xhat| (l1) or squared (l2) + perceptual_weight * LPIPS, means over all elements.

    With bce the reconstruction is logits, the target one-hot: -t log s(x) - (1 - t) log(1 - s(x)).
    """
    match config.reconstruction:
        case "l1":
            pixels = F.l1_loss(reconstruction, target)
        case "l2":
            pixels = F.mse_loss(reconstruction, target)
        case "bce":
            pixels = F.binary_cross_entropy_with_logits(reconstruction, target)
    total, terms = config.pixel_weight * pixels, {"rec": pixels.detach()}
    if perceptual is not None:
        distance = perceptual(reconstruction, target)
        total = total + config.perceptual_weight * distance
        terms["perceptual"] = distance.detach()
    return ReconstructionLoss(total, terms)


def blind_error(target: Tensor, config: LossConfig) -> Tensor:
    """The unweighted pixel term of painting each picture (B, C, H, W) in its mean colour, ()."""
    mean = target.mean((2, 3), keepdim=True)
    if config.reconstruction == "bce":
        mean = torch.logit(mean, eps=1e-6)
    return reconstruction_loss(mean.expand_as(target), target, config, None).terms["rec"]


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Balance both losses at the decoder's last layer (Esser et al. 2021, Eq. 7).

    Losses are (); returns a detached () in [0, 1e4], the same on every process.
    Raises RuntimeError if `last_layer` is in neither graph.
    """
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)[0]
        if loss.requires_grad
        else None
        for loss in (reconstruction, adversarial)
    ]
    if all(gradient is None for gradient in gradients):
        raise RuntimeError("last_layer is in the graph of neither loss")
    return gradient_ratio(*(torch.zeros_like(last_layer) if g is None else g for g in gradients))


def gradient_ratio(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """|mean grad nll| / (|mean grad g| + 1e-4), detached () in [0, 1e4]; means over processes, then norms."""
    both = mean_over_processes(torch.stack((reconstruction_gradient, adversarial_gradient)).detach().float())
    nll_norm, g_norm = both.flatten(1).norm(dim=1)
    return (nll_norm / (g_norm + 1e-4)).clamp(0.0, MAX_ADAPTIVE_WEIGHT)


def last_conv_gradient(features: Tensor, conv: nn.Conv2d, gradient: Tensor) -> Tensor:
    """Gradient of `conv.weight` from its input (B, C, h, w) and the gradient of the picture (B, C', H, W).

    Where the picture is larger than the input, each output position was spread over a square of pixels.
    """
    if gradient.shape[-1] != features.shape[-1]:
        gradient = F.pixel_unshuffle(gradient, gradient.shape[-1] // features.shape[-1])
    weight_gradient: Tensor = torch.ops.aten.convolution_backward(
        gradient.to(features.dtype),
        features,
        conv.weight.to(features.dtype),
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (False, True, False),
    )[1]
    return weight_gradient
