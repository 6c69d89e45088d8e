"""Weights of a published minGPT under our names."""

from __future__ import annotations

import torch
from torch import Tensor

from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig

_NAMES = {
    "tok_emb.weight": "token_embedding.weight",
    "pos_emb": "position_embedding",
    "ln_f.": "norm.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
    "attn.proj.": "attention.proj.",
    "mlp.0.": "mlp.up.",
    "mlp.2.": "mlp.down.",
}


def ours_from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys, join query, key and value, and leave out the constant masks."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("attn.mask") or ".attn.key." in key or ".attn.value." in key:
            continue
        if ".attn.query." in key:
            parts = [state[key.replace(".query.", f".{name}.")] for name in ("query", "key", "value")]
            renamed[key.replace(".attn.query.", ".attention.qkv.")] = torch.cat(parts)
            continue
        for published, ours in _NAMES.items():
            key = key.replace(published, ours)
        renamed[key] = value
    return renamed


def build_published(
    params: dict[str, int], state: dict[str, Tensor], grid: tuple[int, int], prefix: int
) -> Transformer:
    """Our transformer with a published one's weights; every key must be used."""
    config = GPTConfig(
        num_layers=params["n_layer"],
        num_heads=params["n_head"],
        width=params["n_embd"],
        block_size=params["block_size"],
        num_unmasked=params.get("n_unmasked", 0),
    )
    model = build_transformer(config, vocabulary_size=params["vocab_size"], grid=grid, prefix_length=prefix)
    model.load_state_dict(ours_from_published(state))
    return model.eval()
