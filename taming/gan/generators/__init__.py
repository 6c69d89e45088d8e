"""The networks that can paint from noise. A new one is a file, a member of the union and a case here."""

from __future__ import annotations

from types import ModuleType
from typing import Annotated

from pydantic import Field

from taming.errors import ConfigError
from taming.gan.generator import Generator, Trunk
from taming.gan.generators import sagan, stransgan, transgan, vitgan
from taming.gan.generators.sagan import SAGANGeneratorConfig
from taming.gan.generators.stransgan import STransGANGeneratorConfig
from taming.gan.generators.transgan import TransGANGeneratorConfig
from taming.gan.generators.vitgan import ViTGANGeneratorConfig

GeneratorConfig = Annotated[
    SAGANGeneratorConfig | TransGANGeneratorConfig | ViTGANGeneratorConfig | STransGANGeneratorConfig,
    Field(discriminator="kind"),
]


def build_generator(
    config: GeneratorConfig, *, size: tuple[int, int], channels: int = 3, num_classes: int | None = None
) -> Generator:
    """A fresh generator of pictures (B, channels, *size); of classes where `num_classes` is given.

    Raises ConfigError where it cannot paint that size.
    """
    if (reason := config.unsuited(*size)) is not None:
        raise ConfigError(reason)
    generator: Generator = _family(config).generator(config, size, channels, num_classes)
    return generator


def build_trunk(
    config: GeneratorConfig, *, start: tuple[int, int], size: tuple[int, int], channels: int = 3
) -> Trunk:
    """A fresh trunk alone, for stage one: (B, trunk.in_channels, *start) -> pictures (B, channels, *size).

    It works without a style. Raises ConfigError where it cannot paint that size, or not from such maps.
    """
    if (reason := config.unsuited(*size)) is not None:
        raise ConfigError(reason)
    trunk: Trunk = _family(config).trunk(config, start, size, channels)
    return trunk


def _family(config: GeneratorConfig) -> ModuleType:
    match config:
        case SAGANGeneratorConfig():
            return sagan
        case TransGANGeneratorConfig():
            return transgan
        case ViTGANGeneratorConfig():
            return vitgan
        case STransGANGeneratorConfig():
            return stransgan
