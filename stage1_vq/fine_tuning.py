"""A run that starts from a saved tokenizer, whole, or with all but its decoder held still."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stage1_vq.config import VQModelConfig
from stage1_vq.model import ENCODING_PARTS, VQModel
from taming.config import differences
from taming.errors import UserError

TRAINING_ONLY = frozenset(
    {
        "dropout",
        "recompute",
        "quantizer.beta",
        "quantizer.beta_on",
        "quantizer.commitment_weight",
        "quantizer.decay",
        "quantizer.diversity",
        "quantizer.entropy_group_bits",
        "quantizer.entropy_temperature",
        "quantizer.entropy_weight",
        "quantizer.epsilon",
        "quantizer.gradient",
        "quantizer.hard",
        "quantizer.kl_weight",
        "quantizer.kmeans_init",
        "quantizer.loss_weight",
        "quantizer.revive_after",
        "quantizer.revive_below",
        "quantizer.temperature_end",
        "quantizer.temperature_hold_steps",
        "quantizer.temperature_start",
        "quantizer.temperature_steps",
    }
)
"""Keys of the model's config that change neither the shape of a weight nor what it means."""

HEALTH_BUFFERS = {"initialised": 1, "steps_unused": 0, "choice_rate": 1}
"""Buffers that only some options have, and their value in a codebook that is in use."""


def start_from(model: VQModel, source: str, *, another_decoder: bool = False) -> str | None:
    """Give `model` the weights of a saved one. Raises UserError where they would not mean the same.

    With `another_decoder` one of another kind or with other settings stays as it is; returns what the user
    should be told then, None where all weights were taken.
    """
    start = VQModel.from_pretrained(source)
    theirs, ours = (_by_part(weight_facts(config)) for config in (start.config, model.config))
    keeps_decoder = another_decoder and theirs["decoder"] != ours["decoder"]
    if keeps_decoder:
        theirs["decoder"] = ours["decoder"]
    if changed := differences(theirs["rest"] | theirs["decoder"], ours["rest"] | ours["decoder"]):
        way = "copy these keys to model"
        if theirs["decoder"] != ours["decoder"]:
            way += "; with train_only=decoder, model.decoder may be another"
        raise UserError(f"init_from {source} has another model config than this run ({changed}); {way}")
    state, own = start.state_dict(), model.state_dict()
    if keeps_decoder:
        state = {key: value for key, value in state.items() if not key.startswith("decoder.")}
        state |= {key: value for key, value in own.items() if key.startswith("decoder.")}
    for key in own.keys() ^ state.keys():
        name = key.rpartition(".")[2]
        if name not in HEALTH_BUFFERS:
            raise UserError(f"init_from {source}: {key} is on one side only; copy its config to model")
        state.pop(key, None)
        if key in own:
            state[key] = torch.full_like(own[key], HEALTH_BUFFERS[name])
    model.load_state_dict(state)
    if not keeps_decoder:
        return None
    return (
        f"the decoder of kind {model.config.decoder.kind} starts anew: {source} has one of kind "
        f"{start.config.decoder.kind} or with other settings"
    )


def _by_part(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What concerns the decoder alone, and the rest."""
    decoder = {key: value for key, value in facts.items() if key.startswith("decoder.")}
    return {"decoder": decoder, "rest": {key: facts[key] for key in facts.keys() - decoder.keys()}}


def weight_facts(config: VQModelConfig) -> dict[str, Any]:
    """What of a config decides the shapes and the meaning of the weights, by dotted key."""
    values = config.model_dump(mode="json")
    resolution = values.pop("resolution") // values["patch_size"]
    attended = values.pop("attention_resolutions")
    levels = range(len(config.channel_multipliers))
    placed = [level for level in levels if resolution // 2**level in attended]
    facts: dict[str, Any] = {"attention at levels": placed}
    if config.decoder.kind != "cnn":
        facts["decoder.resolution"] = config.resolution
    for key, value in values.items():
        if isinstance(value, dict):
            facts |= {f"{key}.{inner}": part for inner, part in value.items()}
        else:
            facts[key] = value
    return {key: value for key, value in facts.items() if key not in TRAINING_ONLY}


def hold_codes(model: VQModel) -> None:
    """No gradients for what decides the codes: it stays as it is, bit for bit."""
    for part in _encoding_parts(model):
        part.requires_grad_(False)


def train_decoder_only(model: VQModel) -> None:
    """Training mode for the decoder; no dropout, no moving codes before it."""
    model.train()
    for part in _encoding_parts(model):
        part.eval()


def _encoding_parts(model: VQModel) -> list[nn.Module]:
    return [model.get_submodule(name) for name in ENCODING_PARTS]
