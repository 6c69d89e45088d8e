"""Which optimiser moves which weight of stage one."""

from __future__ import annotations

from torch.optim import Optimizer

from stage1_vq.config import CNNDecoderConfig, VQOptimizerConfig
from stage1_vq.model import VQModel
from taming.training.adam import adam
from taming.training.muon import ConvMuon

ENDS = ("encoder.conv_in.", "decoder.conv_out.", "quant_conv.", "post_quant_conv.", "quantize.")
"""Layers that meet pixels or codes: these have a scale of their own, which Muon ignores."""


def autoencoder_optimizers(model: VQModel, config: VQOptimizerConfig) -> dict[str, Optimizer]:
    """By name, for the weights that are to be trained: Adam and, where the config says so, Muon.

    Muon leaves the decoders of GAN systems to Adam: their spectral norms and equalised rates presume it.
    """
    if config.method == "adam":
        return {"model": adam(model.parameters(), config)}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    ends = ENDS if isinstance(model.config.decoder, CNNDecoderConfig) else (*ENDS, "decoder.")
    hidden = [name for name, weight in trained.items() if weight.ndim > 1 and not name.startswith(ends)]
    muon = ConvMuon(
        [trained[name] for name in hidden], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rest = [weight for name, weight in trained.items() if name not in set(hidden)]
    return {"model": adam(rest, config), "model_hidden": muon}
