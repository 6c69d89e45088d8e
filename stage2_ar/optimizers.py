"""Which optimiser moves which weight of stage two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.optim import AdamW, Optimizer

from stage2_ar.config import AROptimizerConfig
from stage2_ar.model import ARModel
from stage2_ar.transformer import weight_decay_groups
from taming.training.muon import ConvMuon
from taming.training.sharded import is_sharded

if TYPE_CHECKING:
    from taming.training.muon_sharded import ShardedMuon

STACKED = {"qkv": 3, "gate_up": 2}
"""Layer -> how many matrices its weight holds: queries, keys and values; gate and up."""


def transformer_optimizers(model: ARModel, config: AROptimizerConfig) -> dict[str, Optimizer]:
    """By name, for the weights that are to be trained: AdamW and, where the config says so, Muon."""
    hidden = hidden_matrices(model) if config.method == "muon" else {}
    taken = {id(weight) for weight in hidden.values()}
    groups = [
        {**group, "params": [weight for weight in group["params"] if id(weight) not in taken]}
        for group in weight_decay_groups(model, config.weight_decay)
    ]
    optimizers: dict[str, Optimizer] = {
        "model": AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    }
    if hidden:
        muon: type[ConvMuon | ShardedMuon] = ConvMuon
        if is_sharded(model):
            from taming.training.muon_sharded import ShardedMuon

            muon = ShardedMuon
        optimizers["model_hidden"] = muon(
            hidden.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            parts=[STACKED.get(name.split(".")[-2], 1) for name in hidden],
        )
    return optimizers


def hidden_matrices(model: ARModel) -> dict[str, nn.Parameter]:
    """The matrices between embedding and head that are to be trained, by name: those that Muon is for."""
    weights = model.transformer.blocks.named_parameters()
    return {name: weight for name, weight in weights if weight.ndim == 2 and weight.requires_grad}
