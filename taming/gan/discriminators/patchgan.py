"""Discriminator that judges patches (Isola et al. 2017, arXiv:1611.07004)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from taming.config import Config
from taming.layers.actnorm import ActNorm
from taming.layers.batch_norm import SharedBatchNorm2d
from taming.layers.spectral_norm import SpectralConv2d

Norm = Literal["batch", "actnorm", "group", "spectral", "none"]


class PatchGANConfig(Config):
    """The published one is 64 channels, 3 layers and batch normalisation."""

    kind: Literal["patchgan"] = "patchgan"
    channels: int = Field(default=64, ge=1)
    num_layers: int = Field(default=3, ge=1)
    norm: Norm = "batch"
    """batch and actnorm as published, with the statistics of all processes; where training.accumulation is
    above 1 they are those of a micro-batch (actnorm's: of the first). group does not mix pictures; spectral
    bounds each layer's gain instead (Miyato et al. 2018, arXiv:1802.05957)."""

    takes_classes: ClassVar[bool] = False

    @property
    def smallest_size(self) -> int:
        """Pixels a side from which there is a logit."""
        return int(3 * 2**self.num_layers)

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        return too_small(self.kind, self.smallest_size, height, width)


def too_small(kind: str, least: int, height: int, width: int) -> str | None:
    """What is said of pictures with fewer than `least` pixels a side; None of others."""
    if min(height, width) >= least:
        return None
    return (
        f"pictures of {height}x{width} are too small for a discriminator of kind {kind} that needs {least} "
        "pixels a side; use fewer num_layers, or larger pictures"
    )


class PatchGAN(nn.Module):
    """Pictures (B, in_channels, H, W) -> logits (B, 1, h, w), positive for real.

    4x4 convolutions, num_layers of stride 2 and two of stride 1, LeakyReLU 0.2, weights from N(0, 0.02).
    """

    def __init__(self, config: PatchGANConfig, in_channels: int = 3) -> None:
        super().__init__()
        conv = SpectralConv2d if config.norm == "spectral" else nn.Conv2d
        width = config.channels
        layers: list[nn.Module] = [conv(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for index in range(1, config.num_layers + 1):
            wider = config.channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            layers += [
                # Batch normalisation takes out any bias before it.
                conv(width, wider, 4, stride, 1, bias=config.norm != "batch"),
                _norm(config.norm, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        layers.append(conv(width, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and config.norm != "spectral":  # which divides the length out
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        logits: Tensor = self.main(images)
        return logits


def _norm(kind: Norm, channels: int) -> nn.Module:
    match kind:
        case "batch":
            return SharedBatchNorm2d(channels)
        case "actnorm":
            return ActNorm(channels)
        case "group":
            return nn.GroupNorm(next(n for n in (32, 16, 8, 4, 2, 1) if channels % n == 0), channels)
        case "spectral" | "none":
            return nn.Identity()
