"""Ways to make codes of latents, one a file. A new one is a file, a member of the union and a case here."""

from __future__ import annotations

from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.nearest import NearestConfig, NearestQuantizer

__all__ = ["NearestConfig", "NearestQuantizer", "Quantizer", "QuantizerConfig", "build_quantizer"]

# With a second member: Annotated[NearestConfig | OtherConfig, Field(discriminator="kind")].
QuantizerConfig = NearestConfig


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config.kind` names, freshly initialised."""
    match config:
        case NearestConfig():
            return NearestQuantizer(config)
