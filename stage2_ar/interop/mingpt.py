"""Weights of a published minGPT as those of our `gpt` transformer.

Axes: V entries of the table, T positions of the block, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stage2_ar.interop.published_config import SHAPE_KEYS, PublishedGPT
from stage2_ar.transformer_config import GPTConfig
from taming.config import build_config
from taming.errors import ArtifactError, ConfigError

SECTION = "transformer."
MASK = ".attn.mask"
NAMES = {
    "tok_emb.weight": "token_embedding.weight",
    "pos_emb": "position_embedding",
    "ln_f.": "norm.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
    "attn.proj.": "attention.proj.",
    "mlp.0.": "mlp.up.",
    "mlp.2.": "mlp.down.",
}


@dataclass(frozen=True)
class ImportedGPT:
    """A published transformer in our words."""

    config: GPTConfig
    state: dict[str, Tensor]
    """Under our names, queries, keys and values of a layer in one."""
    masks: tuple[str, ...]
    """Tensors of the source that were not taken: constants."""
    notes: tuple[str, ...]


def read_gpt(tensors: Mapping[str, Tensor], published: PublishedGPT, source: Path) -> ImportedGPT:
    """Our config and state of the published weights `tensors` (with or without "transformer.").

    Width, table, block and layers follow from the shapes; the file's values must agree with them.
    Raises ArtifactError naming what is missing or misshapen, ConfigError for heads that do not divide.
    """
    names = {name.removeprefix(SECTION): name for name in tensors}
    state = {short: tensors[name] for short, name in names.items()}
    masks = {name: value for name, value in state.items() if name.endswith(MASK)}
    weights = {name: value for name, value in state.items() if name not in masks}
    found = _sizes(weights, source)
    for key in SHAPE_KEYS:
        if key in published.shapes and published.shapes[key] != found[key]:
            raise ArtifactError(
                f"checkpoint {source}: {key} is {found[key]} by its weights and {published.shapes[key]} by "
                "the YAML file; give the file that came with this checkpoint"
            )
    width = found["n_embd"]
    if width % published.num_heads:
        raise ConfigError(
            f"n_head {published.num_heads} does not divide the width {width} of {source}; the weights do not "
            "tell the number of heads, give the YAML file that came with this checkpoint"
        )
    _check_shapes(weights, found, source)
    num_unmasked, notes = published.num_unmasked, []
    if masks:
        num_unmasked = _num_unmasked(masks, source)
        if max(num_unmasked, 1) != max(published.num_unmasked, 1):
            notes.append(
                f"n_unmasked is {num_unmasked} by the checkpoint's masks, which decide, and "
                f"{published.num_unmasked} by the YAML file"
            )
    embedding, attention, residual = published.dropouts
    config = build_config(
        GPTConfig,
        {
            "num_layers": found["n_layer"],
            "num_heads": published.num_heads,
            "width": width,
            "embedding_dropout": embedding,
            "attention_dropout": attention,
            "residual_dropout": residual,
            "num_unmasked": num_unmasked,
            "block_size": found["block_size"],
            "table_size": found["vocab_size"],
        },
        source=str(source),
    )
    return ImportedGPT(config, renamed(weights), tuple(names[mask] for mask in masks), tuple(notes))


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights, without masks, under our names; query, key and value joined in this order."""
    state: dict[str, Tensor] = {}
    for key, value in weights.items():
        if ".attn.key." in key or ".attn.value." in key:
            continue
        if ".attn.query." in key:
            parts = [weights[key.replace(".query.", f".{name}.")] for name in ("query", "key", "value")]
            state[key.replace(".attn.query.", ".attention.qkv.")] = torch.cat(parts)
            continue
        name = key
        for published, ours in NAMES.items():
            name = name.replace(published, ours)
        state[name] = value
    return state


def _sizes(weights: Mapping[str, Tensor], source: Path) -> dict[str, int]:
    table, positions = weights.get("tok_emb.weight"), weights.get("pos_emb")
    layers = {int(match[1]) for key in weights if (match := re.match(r"blocks\.(\d+)\.", key))}
    if table is None or positions is None or table.ndim != 2 or positions.ndim != 3 or not layers:
        raise ArtifactError(
            f"checkpoint {source} holds no transformer of the published form: tok_emb.weight (V, D), pos_emb "
            "(1, T, D) and blocks.0.* are needed, with or without 'transformer.' before them"
        )
    if max(layers) >= len(layers):
        raise ArtifactError(f"checkpoint {source} has blocks.{max(layers)} and not all those before it")
    vocabulary, width = table.shape
    return {
        "vocab_size": vocabulary,
        "block_size": positions.shape[1],
        "n_layer": max(layers) + 1,
        "n_embd": width,
    }


def _check_shapes(weights: Mapping[str, Tensor], sizes: Mapping[str, int], source: Path) -> None:
    vocabulary, block, layers, width = (sizes[key] for key in SHAPE_KEYS)
    wanted: dict[str, tuple[int, ...]] = {
        "tok_emb.weight": (vocabulary, width),
        "pos_emb": (1, block, width),
        "head.weight": (vocabulary, width),
    }
    outputs = {"attn.key": width, "attn.query": width, "attn.value": width, "attn.proj": width}
    for layer in range(layers):
        for name, rows in (outputs | {"mlp.0": 4 * width}).items():
            wanted[f"blocks.{layer}.{name}.weight"] = (rows, width)
            wanted[f"blocks.{layer}.{name}.bias"] = (rows,)
        wanted[f"blocks.{layer}.mlp.2.weight"] = (width, 4 * width)
        wanted[f"blocks.{layer}.mlp.2.bias"] = (width,)
    norms = ["ln_f", *(f"blocks.{layer}.{name}" for layer in range(layers) for name in ("ln1", "ln2"))]
    wanted |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    problems = []
    missing, unexpected = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    for what, names in (("missing", missing), ("not expected", unexpected)):
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{len(names)} tensors are {what} ({shown})")
    for name in sorted(wanted.keys() & weights.keys()):
        if weights[name].shape != wanted[name]:
            problems.append(f"{name} is {tuple(weights[name].shape)} and should be {wanted[name]}")
    if problems:
        raise ArtifactError(
            f"checkpoint {source} holds no whole transformer: {'; '.join(problems[:4])}; fetch it again"
        )


def _num_unmasked(masks: Mapping[str, Tensor], source: Path) -> int:
    """How many first positions see each other, by the masks: causal ones with a square filled in."""
    first = next(iter(masks.values()))
    if first.ndim != 4 or first.shape[-1] != first.shape[-2]:
        raise ArtifactError(f"checkpoint {source}: its attention masks have the shape {tuple(first.shape)}")
    size = first.shape[-1]
    count = int((first[0, 0, 0] != 0).sum())
    expected = torch.ones(size, size, dtype=torch.bool).tril()
    expected[:count, :count] = True
    if any(
        mask.shape != first.shape or not torch.equal(mask[0, 0] != 0, expected) for mask in masks.values()
    ):
        raise ArtifactError(
            f"checkpoint {source}: its attention masks are not causal ones with an unmasked beginning, and "
            "no other can be imported"
        )
    return 0 if count == 1 else count
