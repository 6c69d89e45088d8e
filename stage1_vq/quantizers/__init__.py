"""Ways to make codes of latents, one a file. A new one is a file, a member of the union and a case here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.bsq import BSQConfig, BSQQuantizer
from stage1_vq.quantizers.ema import EMAConfig, EMAQuantizer
from stage1_vq.quantizers.fsq import FSQConfig, FSQQuantizer
from stage1_vq.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from stage1_vq.quantizers.ibq import IBQConfig, IBQQuantizer
from stage1_vq.quantizers.lfq import LFQConfig, LFQQuantizer
from stage1_vq.quantizers.nearest import NearestConfig, NearestQuantizer
from stage1_vq.quantizers.residual import ResidualConfig, ResidualQuantizer
from stage1_vq.quantizers.simvq import SimVQConfig, SimVQQuantizer

__all__ = [
    "BSQConfig",
    "BSQQuantizer",
    "EMAConfig",
    "EMAQuantizer",
    "FSQConfig",
    "FSQQuantizer",
    "GumbelConfig",
    "GumbelQuantizer",
    "IBQConfig",
    "IBQQuantizer",
    "LFQConfig",
    "LFQQuantizer",
    "NearestConfig",
    "NearestQuantizer",
    "Quantizer",
    "QuantizerConfig",
    "ResidualConfig",
    "ResidualQuantizer",
    "SimVQConfig",
    "SimVQQuantizer",
    "build_quantizer",
]

QuantizerConfig = Annotated[
    NearestConfig
    | EMAConfig
    | GumbelConfig
    | FSQConfig
    | LFQConfig
    | BSQConfig
    | SimVQConfig
    | ResidualConfig
    | IBQConfig,
    Field(discriminator="kind"),
]


def build_quantizer(config: QuantizerConfig) -> Quantizer:
    """The quantizer that `config.kind` names, freshly initialised."""
    match config:
        case NearestConfig():
            return NearestQuantizer(config)
        case EMAConfig():
            return EMAQuantizer(config)
        case GumbelConfig():
            return GumbelQuantizer(config)
        case FSQConfig():
            return FSQQuantizer(config)
        case LFQConfig():
            return LFQQuantizer(config)
        case BSQConfig():
            return BSQQuantizer(config)
        case SimVQConfig():
            return SimVQQuantizer(config)
        case ResidualConfig():
            return ResidualQuantizer(config)
        case IBQConfig():
            return IBQQuantizer(config)
