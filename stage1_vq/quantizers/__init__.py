"""Ways to make codes of latents, one a file. A new one is a file, a member of the union and a case here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.ema import EMAConfig, EMAQuantizer
from stage1_vq.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from stage1_vq.quantizers.nearest import NearestConfig, NearestQuantizer

__all__ = [
    "EMAConfig",
    "EMAQuantizer",
    "GumbelConfig",
    "GumbelQuantizer",
    "NearestConfig",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "build_quantizer",
]

QuantizerConfig = Annotated[NearestConfig | EMAConfig | GumbelConfig, Field(discriminator="kind")]


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config.kind` names, freshly initialised."""
    match config:
        case NearestConfig():
            return NearestQuantizer(config)
        case EMAConfig():
            return EMAQuantizer(config)
        case GumbelConfig():
            return GumbelQuantizer(config)
