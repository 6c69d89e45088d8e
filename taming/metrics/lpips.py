"""Perceptual distance: LPIPS with VGG16 (Zhang et al. 2018, arXiv:1801.03924), as a loss and as a metric.

The network, its input scaling and the learned weights of its five layers are those of the `lpips` package.
Here they are evaluated so that a training step pays least: the target's features are computed without
gradient, dropout is off, all weights are frozen.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lpips
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taming.archive import check_stored
from taming.errors import UserError

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"

ELEMENTS_PER_BLOCK = 1 << 19
"""2 MiB in fp32: the passes over a block stay in the cache."""


class PerceptualDistance(nn.Module):
    """Distance () of two batches (B, 3 or 1, H, W) in [-1, 1], mean over the batch; 0 for equal ones.

    Gradient reaches the first argument only. Features follow autocast (their weights stay fp32), unless
    `follow_autocast` is off; they are compared in fp32.
    `vgg_weights` is a file of torchvision's VGG16 (null: torchvision's cache, or its download).
    `random_weights` is for benchmarks and tests: the same work, no meaning.
    Raises UserError where the weights cannot be had.
    """

    def __init__(
        self,
        vgg_weights: str | Path | None = None,
        *,
        random_weights: bool = False,
        follow_autocast: bool = True,
    ) -> None:
        super().__init__()
        self.follow_autocast = follow_autocast
        # Found before anything is built, so that their absence is told at once.
        state = None if random_weights else _vgg_state(vgg_weights)
        network: Any = _build_lpips()
        if state is not None:
            _load_features(network.net, state)
        network.requires_grad_(False).to(memory_format=torch.channels_last)
        self.scaling: nn.Module = network.scaling_layer
        self.slices = nn.ModuleList(getattr(network.net, f"slice{index}") for index in range(1, 6))
        self.weights = nn.ParameterList(
            nn.Parameter(lin.model[-1].weight.detach().clone(), requires_grad=False) for lin in network.lins
        )
        super().train(False)

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in eval mode: as a loss its dropout would be noise."""
        return super().train(False)

    def forward(self, images: Tensor, target: Tensor) -> Tensor:
        enabled = self.follow_autocast and torch.is_autocast_enabled(images.device.type)
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=enabled):
            with torch.no_grad():
                wanted = self._features(target)
            found = self._features(images)
        distance = torch.zeros((), device=images.device)
        for a, b, weight in zip(found, wanted, self.weights, strict=True):
            distance = distance + _LayerDistance.apply(a, b, weight)
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        h = self.scaling(images.float()).contiguous(memory_format=torch.channels_last)
        features = []
        for part in self.slices:
            h = part(h)
            features.append(h)
        return features


class _LayerDistance(torch.autograd.Function):
    """Mean over pictures and places of sum_c w_c (a_c / |a| - b_c / |b|)^2, (); gradient for a only.

    Value and gradient are found together, in fp32, a block of places at a time: a dozen elementwise passes
    over the largest features would otherwise cost as much as the convolutions that made them.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        rows_a, rows_b = (rearrange(t, "b c h w -> (b h w) c") for t in (a, b))
        weight = weight.flatten()
        places, channels = rows_a.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows_a) if wanted else rows_a[:0]
        total = torch.zeros((), device=a.device)
        block = max(1, ELEMENTS_PER_BLOCK // channels)
        for start in range(0, places, block):
            part, other = rows_a[start : start + block].float(), rows_b[start : start + block].float()
            norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            length = norm + 1e-10
            unit = part / length
            difference = unit - other / (torch.linalg.vector_norm(other, dim=1, keepdim=True) + 1e-10)
            weighted = difference * weight
            total += (weighted * difference).sum()
            if wanted:
                # d unit / d part = (I - unit part^T / |part|) / length; 0 where no feature fires.
                along = (weighted * part).sum(1, keepdim=True) / norm.clamp(min=1e-30)
                gradient[start : start + block] = (weighted - unit * along) * (2 / places / length)
        ctx.save_for_backward(gradient)
        ctx.shape = a.shape
        return total / places

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        batch, _, height, width = ctx.shape
        gradient = gradient * grad.to(gradient.dtype)
        return rearrange(gradient, "(b h w) c -> b c h w", b=batch, h=height, w=width), None, None


def _build_lpips() -> nn.Module:
    with warnings.catch_warnings():
        # The package calls torchvision by an older name of its argument.
        warnings.simplefilter("ignore", UserWarning)
        network: nn.Module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return network.eval()


def cached_vgg_weights() -> Path | None:
    """The file of VGG16 weights that torchvision would use, where it is on this machine."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
    return path if path.is_file() else None


def _vgg_state(path: str | Path | None) -> dict[str, Tensor]:
    out = (
        "give a file of torchvision's VGG16 (loss.vgg_weights=PATH or --vgg-weights PATH), or do without "
        "(loss.perceptual_weight=0, no --lpips)"
    )
    if path is None:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE
        try:
            state = torch.hub.load_state_dict_from_url(
                VGG16_URL, map_location="cpu", weights_only=True, progress=False
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the perceptual loss needs torchvision's VGG16 weights, which are neither at {cached} nor "
                f"to be downloaded ({error}); {out}"
            ) from None
        return dict(state)
    check_stored(path)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        # torch.load raises many types for a file that is not its own; all mean the same to a user.
        raise UserError(f"vgg_weights {path} cannot be read ({type(error).__name__}); {out}") from None


def _load_features(features: nn.Module, state: dict[str, Tensor]) -> None:
    """Load torchvision's "features.N.weight" into the slices, whose layers kept their numbers."""
    for key, tensor in features.state_dict().items():
        _, number, name = key.split(".")
        source = state.get(f"features.{number}.{name}")
        if source is None or source.shape != tensor.shape:
            raise UserError(
                f"vgg_weights hold no features.{number}.{name} of shape {tuple(tensor.shape)}: they are not "
                "those of torchvision's VGG16"
            )
        tensor.copy_(source)
