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
import torch.nn.functional as F
from torch import Tensor, nn

from taming.errors import UserError

VGG16_FILE = "vgg16-397923af.pth"
VGG16_URL = f"https://download.pytorch.org/models/{VGG16_FILE}"


class PerceptualDistance(nn.Module):
    """Distance () of two batches (B, 3 or 1, H, W) in [-1, 1], mean over the batch; 0 for equal ones.

    Gradient reaches the first argument only. The features are computed in fp32, or in bf16 where autocast
    is on and `follow_autocast`; their comparison always in fp32.
    `vgg_weights` is a file of torchvision's VGG16 (null: torchvision's cache, or its download).
    `random_weights` is for benchmarks and tests: the same work, no meaning.
    Raises UserError where the weights cannot be had.
    """

    def __init__(
        self,
        vgg_weights: str | Path | None = None,
        *,
        random_weights: bool = False,
        follow_autocast: bool = False,
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
            distance = distance + _layer_distance(a.float(), b.float(), weight)
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        h = self.scaling(images.float()).contiguous(memory_format=torch.channels_last)
        features = []
        for part in self.slices:
            h = part(h)
            features.append(h)
        return features


def _layer_distance(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Mean over pictures and places of sum_c w_c (a_c / |a| - b_c / |b|)^2."""
    # vector_norm has a gradient at zero (a place where no feature fires), which sqrt has not.
    a = a / (torch.linalg.vector_norm(a, dim=1, keepdim=True) + 1e-10)
    b = b / (torch.linalg.vector_norm(b, dim=1, keepdim=True) + 1e-10)
    return F.conv2d((a - b).square(), weight).mean()


def _build_lpips() -> nn.Module:
    with warnings.catch_warnings():
        # The package calls torchvision by an older name of its argument.
        warnings.simplefilter("ignore", UserWarning)
        network: nn.Module = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return network.eval()


def _vgg_state(path: str | Path | None) -> dict[str, Tensor]:
    out = "set loss.perceptual_weight=0, or loss.vgg_weights=PATH to a file of torchvision's VGG16"
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
