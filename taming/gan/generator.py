"""What every painter from noise or from latents is made of: a stem and a trunk.

The stem turns noise and a class into a map and a style; the trunk turns those into a picture. Stage one's
decoders are trunks behind a projection of the latents.

Axes: B pictures, Z noise, C channels, H W pixels, h w cells of the map that enters the trunk, S style.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taming.errors import UserError
from taming.layers.spectral_norm import still


class Painted(NamedTuple):
    """A picture, and what its last layer saw."""

    images: Tensor
    """(B, C, H, W); not clamped."""
    features: tuple[Tensor, ...]
    """Detached: what `paint` makes the images of."""


class StemOutput(NamedTuple):
    """What a trunk starts from."""

    features: Tensor
    """(B, C, h, w)."""
    style: Tensor | None
    """(B, S), or None where the trunk has none."""


class Painter(nn.Module, ABC):
    """Anything whose last layer the adaptive weight of two losses can look at."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The raw weight of the last layer, as the optimiser moves it."""

    @abstractmethod
    def paint(self, *features: Tensor) -> Tensor:
        """The last layer and what follows it: the images again from `Painted.features`."""

    def last_gradient(self, features: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """Gradient of `last_layer` from `Painted.features` and the gradient of the images (B, C, H, W).

        The last layer alone is computed again, so that no graph has to be kept; nothing moves.
        """
        with torch.enable_grad(), still(self):
            images = self.paint(*features)
            (found,) = torch.autograd.grad(images, self.last_layer, gradient.to(images.dtype))
        return found

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where it cannot paint pictures of this size; by default it can."""

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule: `progress` is the share of the training in [0, 1]."""


class Trunk(Painter):
    """Maps (B, in_channels, *start)[, style] -> pictures (B, C, *size), about [-1, 1]."""

    def __init__(self, in_channels: int, start: tuple[int, int], size: tuple[int, int]) -> None:
        super().__init__()
        self.in_channels, self.start, self.size = in_channels, start, size

    @abstractmethod
    def forward(self, features: Tensor, style: Tensor | None = None) -> Painted: ...

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where it cannot paint pictures of this size."""
        if (height, width) != self.size:
            raise UserError(
                f"this {type(self).__name__} paints pictures of {self.size[0]}x{self.size[1]} only, not "
                f"{height}x{width}; train one for that size, or use a convolutional decoder"
            )


class Generator(nn.Module):
    """Noise (B, Z) and, where it is conditional, classes (B,) int64 -> pictures (B, C, H, W)."""

    def __init__(self, stem: nn.Module, trunk: Trunk, noise_dim: int, num_classes: int | None) -> None:
        """`stem(z, y)` gives a StemOutput."""
        super().__init__()
        self.stem, self.trunk = stem, trunk
        self.noise_dim, self.num_classes = noise_dim, num_classes

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        return self.trunk.size

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.painted(z, y).images

    def painted(self, z: Tensor, y: Tensor | None = None) -> Painted:
        """The pictures, and what their last layer saw. Raises UserError where classes are missing."""
        if self.num_classes is None:
            y = None
        elif y is None:
            raise UserError(
                f"this generator paints {self.num_classes} classes: give one for each picture, (B,) int64"
            )
        features, style = self.stem(z, y)
        painted: Painted = self.trunk(features, style)
        return painted

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule: `progress` is the share of the training in [0, 1]."""
        self.trunk.before_step(progress)
