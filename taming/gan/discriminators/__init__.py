"""The networks that can judge. A new one is a file, a member of the union and a case here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import nn

from taming.errors import ConfigError
from taming.gan.discriminators.patchgan import PatchGAN, PatchGANConfig
from taming.gan.discriminators.sagan import SAGANDiscriminator, SAGANDiscriminatorConfig
from taming.gan.discriminators.stransgan import STransGANDiscriminator, STransGANDiscriminatorConfig
from taming.gan.discriminators.stylegan import StyleGANConfig, StyleGANDiscriminator
from taming.gan.discriminators.transgan import TransGANDiscriminator, TransGANDiscriminatorConfig
from taming.gan.discriminators.vitgan import ViTGANDiscriminator, ViTGANDiscriminatorConfig

DiscriminatorConfig = Annotated[
    PatchGANConfig
    | StyleGANConfig
    | SAGANDiscriminatorConfig
    | TransGANDiscriminatorConfig
    | ViTGANDiscriminatorConfig
    | STransGANDiscriminatorConfig,
    Field(discriminator="kind"),
]


def build_discriminator(
    config: DiscriminatorConfig,
    in_channels: int = 3,
    *,
    size: tuple[int, int] | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """A fresh network: pictures (B, in_channels, H, W)[, classes (B,)] -> logits (B, 1, ...), high for real.

    `size` (H, W) is that of the pictures, which some networks are built for. Raises ConfigError where they
    cannot be, or classes are wanted of a network that takes none.
    """
    if size is not None and (reason := config.unsuited(*size)) is not None:
        raise ConfigError(reason)
    if num_classes is not None and not config.takes_classes:
        raise ConfigError(
            f"a discriminator of kind {config.kind} does not judge classes; use sagan, transgan, vitgan or "
            "stransgan, or train without classes"
        )
    match config:
        case PatchGANConfig():
            return PatchGAN(config, in_channels)
        case StyleGANConfig():
            return StyleGANDiscriminator(config, in_channels)
    if size is None:
        raise ConfigError(
            f"a discriminator of kind {config.kind} is built for one size of pictures: say which"
        )
    match config:
        case SAGANDiscriminatorConfig():
            return SAGANDiscriminator(config, in_channels, size, num_classes)
        case TransGANDiscriminatorConfig():
            return TransGANDiscriminator(config, in_channels, size, num_classes)
        case ViTGANDiscriminatorConfig():
            return ViTGANDiscriminator(config, in_channels, size, num_classes)
        case STransGANDiscriminatorConfig():
            return STransGANDiscriminator(config, in_channels, size, num_classes)
