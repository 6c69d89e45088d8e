"""A run that starts from a saved pipeline: which weights it takes over, and which begin anew.

The transformer's blocks, codes and head must be those of the source. Its condition is taken over as far as
it is the same; of another kind, or with other sizes, it (or that part of it) begins anew. So does what
depends on the grid, where the grid is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage2_ar.config import ARModelConfig
from stage2_ar.model import ARTIFACT_KIND, ARModel
from stage2_ar.transformer_config import GPTConfig
from taming.artifact import load_artifact
from taming.config import build_config, differences
from taming.errors import UserError

FREE = frozenset(
    {
        "embedding_dropout",
        "attention_dropout",
        "residual_dropout",
        "zero_init_head",
        "attention_window",
        "block_size",
        "table_size",
    }
)
"""Keys of the transformer's config that may differ: they move no weight that is taken over."""
MEANING = frozenset({"kind", "names", "source", "tokenizer_hash", "vocabulary", "weights_hash"})
"""Keys of a condition's config with which the meaning of its weights changes, whatever their shapes."""
TARGETS = "transformer.target_embedding"
TABLES = ("transformer.token_embedding.weight", "transformer.head.weight")
POSITIONS = "transformer.position_embedding"
CONDITION = "condition."


def check_start(config: ARModelConfig, source: str) -> ARModelConfig:
    """The config of the saved model `source`. Raises UserError where a model of `config` cannot start there.

    Reads the weights' file but builds no model.
    """
    return _read(config, source)[0]


def start_from(model: ARModel, source: str) -> list[str]:
    """Give `model` the weights of the pipeline `source` where they mean the same; returns what is new.

    Raises UserError as `check_start`.
    """
    there, saved = _read(model.config, source)
    own = model.state_dict()
    same_meaning = _meaning(there.condition.model_dump()) == _meaning(model.config.condition.model_dump())
    state: dict[str, Tensor] = {}
    anew: list[str] = []
    moved = False
    for key, value in own.items():
        found = saved.get(key)
        if key.startswith(CONDITION) and not same_meaning:
            found = None
        if found is not None and key in TABLES:
            state[key] = _codes_of(value, found, model.config.vocabulary_size)
        elif found is not None and key == POSITIONS:
            prefixes = _prefix_length(there), model.transformer.prefix_length
            state[key], complete = _positions(value, found, *prefixes, _cells(model.config))
            moved = not complete
        elif found is not None and found.shape == value.shape:
            state[key] = found
        else:
            # At zero, target positions change nothing at first.
            state[key] = torch.zeros_like(value) if key == TARGETS else value
            anew.append(key)
    model.load_state_dict(state)
    names = _said(anew, own.keys() - set(anew))
    if moved:
        names.append("the condition's learned positions")
    if there.order != model.config.order:
        names.append(f"the order of writing ({there.order.kind} there, {model.config.order.kind} here)")
    return names


def hold_transformer(model: ARModel) -> None:
    """No gradients for the transformer. Raises UserError where the condition has nothing to train."""
    model.transformer.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.condition.parameters()):
        raise UserError(
            f"train_only condition: a condition of kind {model.config.condition.kind} has no weights of its "
            "own here (it uses the transformer's table); leave train_only out"
        )


def _prefix_length(config: ARModelConfig) -> int:
    """P of a saved model on its own grid."""
    with torch.device("meta"):
        return ARModel(config).transformer.prefix_length


def _read(config: ARModelConfig, source: str) -> tuple[ARModelConfig, dict[str, Tensor]]:
    values, state = load_artifact(source, ARTIFACT_KIND, subfolder="transformer")
    there = build_config(ARModelConfig, values, source=f"config of {source}")
    if there.tokenizer_hash != config.tokenizer_hash or there.vocabulary_size != config.vocabulary_size:
        raise UserError(
            f"init_from {source} writes {there.vocabulary_size} codes of the tokenizer "
            f"{there.tokenizer_hash[:12]}, this run has {config.vocabulary_size} of "
            f"{config.tokenizer_hash[:12]}: its codes mean something else; train on codes of its own "
            f"tokenizer, set -o tokenizer={source}/tokenizer (or .../model/tokenizer of a run) or encode the "
            "data with it"
        )
    here_facts, there_facts = _facts(config), _facts(there)
    if not there.transformer.target_positions:  # they may be added, but not be left out
        here_facts.pop("target_positions", None)
    if changed := differences(there_facts, here_facts):
        raise UserError(
            f"init_from {source} has another transformer than this run ({changed}); copy these keys to "
            "transformer"
        )
    height, width = (side * there.downsample_factor for side in there.grid)
    if isinstance(config.transformer, GPTConfig) and there.grid != config.grid:
        raise UserError(
            f"init_from {source} has learned positions of {there.grid[0]}x{there.grid[1]} cells, this "
            f"run has {config.grid[0]}x{config.grid[1]}: they mean nothing there; train on pictures of "
            f"{height}x{width} (larger ones are sampled with a sliding window), or start from a transformer "
            "of kind llama"
        )
    return there, state


def _facts(config: ARModelConfig) -> dict[str, Any]:
    """What of the transformer decides the shapes and the meaning of the weights."""
    values = config.transformer.model_dump(mode="json")
    if not values["target_positions"]:
        del values["target_positions"]
    if "mlp_width" in values and not isinstance(config.transformer, GPTConfig):
        values["mlp_width"] = config.transformer.hidden_width
    return {key: value for key, value in values.items() if key not in FREE}


def _meaning(values: Any) -> list[Any]:
    """What of a condition and of its parts tells what its weights stand for, in order."""
    if isinstance(values, dict):
        own = [(key, values[key]) for key in sorted(MEANING & values.keys())]
        return own + [item for key in sorted(values) for item in _meaning(values[key])]
    if isinstance(values, list | tuple):
        return [item for value in values for item in _meaning(value)]
    return []


def _cells(config: ARModelConfig) -> int:
    return config.grid[0] * config.grid[1]


def _codes_of(own: Tensor, found: Tensor, vocabulary_size: int) -> Tensor:
    """A table with the codes' rows of another, and its other rows where both have as many."""
    if own.shape == found.shape:
        return found
    table = own.clone()
    table[:vocabulary_size] = found[:vocabulary_size]
    return table


def _positions(own: Tensor, found: Tensor, there: int, here: int, cells: int) -> tuple[Tensor, bool]:
    """Learned positions (1, P + cells, D) with those of the cells, and of the prefix where P is the same."""
    table = own.clone()
    # The very last place of an imported block may be missing: that code is never an input.
    count = min(cells, found.shape[1] - there, own.shape[1] - here)
    table[:, here : here + count] = found[:, there : there + count]
    if there == here:
        table[:, :here] = found[:, :here]
    return table, there == here


def _said(anew: list[str], taken: set[str]) -> list[str]:
    """What begins anew, whole modules by one name."""
    names: list[str] = []
    for key in anew:
        parts = key.split(".")
        # The shortest name that covers nothing but what is new.
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            if not any(other == name or other.startswith(name + ".") for other in taken):
                break
        if name not in names:
            names.append(name)
    return names
