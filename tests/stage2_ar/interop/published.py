"""Published transformers with random weights, and what they compute, in the plainest way.

Axes: B samples, T positions, V entries of the table, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from stage1_vq import VQModel
from tests.stage1_vq.interop.published import published_yaml

Grid = tuple[int, int]
HEADS, WIDTH, LAYERS = 4, 32, 2


@dataclass(frozen=True)
class PublishedGPT:
    """A minGPT by its state dict."""

    state: dict[str, Tensor]
    num_unmasked: int = 0

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, V), every position by itself; no cache, no fused anything."""
        state, length = self.state, tokens.shape[1]
        mask = torch.ones(length, length).tril().bool()
        mask[: self.num_unmasked, : self.num_unmasked] = True
        x = state["tok_emb.weight"][tokens] + state["pos_emb"][:, :length]
        for layer in range(LAYERS):
            name = f"blocks.{layer}."
            normed = functional.layer_norm(x, (WIDTH,), state[name + "ln1.weight"], state[name + "ln1.bias"])
            query, key, value = (
                rearrange(self._linear(normed, f"{name}attn.{part}"), "b t (h c) -> b h t c", h=HEADS)
                for part in ("query", "key", "value")
            )
            scores = query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
            weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            x = x + self._linear(rearrange(weights @ value, "b h t c -> b t (h c)"), name + "attn.proj")
            normed = functional.layer_norm(x, (WIDTH,), state[name + "ln2.weight"], state[name + "ln2.bias"])
            x = x + self._linear(functional.gelu(self._linear(normed, name + "mlp.0")), name + "mlp.2")
        x = functional.layer_norm(x, (WIDTH,), state["ln_f.weight"], state["ln_f.bias"])
        return x @ state["head.weight"].T

    def teacher_forced(self, prefix: Tensor, codes: Tensor, vocabulary: int) -> Tensor:
        """prefix (B, P), codes (B, N) in the order of writing -> logits (B, N, V) of each code."""
        tokens = torch.cat((prefix, codes), dim=1)[:, :-1]
        return self.logits(tokens)[:, prefix.shape[1] - 1 :, :vocabulary]

    def greedy(self, prefix: Tensor, count: int, vocabulary: int) -> Tensor:
        """The most probable code, one after the other: (B, count)."""
        tokens = prefix
        for _ in range(count):
            drawn = self.logits(tokens)[:, -1, :vocabulary].argmax(-1, keepdim=True)
            tokens = torch.cat((tokens, drawn), dim=1)
        return tokens[:, prefix.shape[1] :]

    def greedy_sliding(self, condition: Tensor, window: Grid, vocabulary: int) -> Tensor:
        """The published window, cell by cell: condition (B, H, W) tokens -> codes (B, H, W)."""
        height, width = condition.shape[1:]
        codes = torch.zeros_like(condition)
        for row in range(height):
            for column in range(width):
                local_row, local_column = _local(row, height, window[0]), _local(column, width, window[1])
                rows = slice(row - local_row, row - local_row + window[0])
                columns = slice(column - local_column, column - local_column + window[1])
                prefix = condition[:, rows, columns].flatten(1)
                tokens = torch.cat((prefix, codes[:, rows, columns].flatten(1)), dim=1)[:, :-1]
                place = prefix.shape[1] - 1 + local_row * window[1] + local_column
                codes[:, row, column] = self.logits(tokens)[:, place, :vocabulary].argmax(-1)
        return codes

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[name + ".weight"].T + self.state[name + ".bias"]


def _local(index: int, size: int, window: int) -> int:
    """Where in its window a cell lies."""
    half = window // 2
    if index <= half:
        return index
    if size - index < window - half:
        return window - (size - index)
    return half


def random_gpt(table: int, block: int, *, num_unmasked: int = 0, seed: int = 0) -> PublishedGPT:
    """Weights large enough that each token matters to those after it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    state = {
        "tok_emb.weight": normal(table, WIDTH, std=1.0),
        "pos_emb": normal(1, block, WIDTH, std=1.5),
        "ln_f.weight": 1 + normal(WIDTH),
        "ln_f.bias": normal(WIDTH),
        "head.weight": normal(table, WIDTH, std=0.5),
    }
    linears = {f"attn.{part}": (WIDTH, WIDTH) for part in ("key", "query", "value", "proj")}
    linears |= {"mlp.0": (4 * WIDTH, WIDTH), "mlp.2": (WIDTH, 4 * WIDTH)}
    for layer in range(LAYERS):
        for name, shape in linears.items():
            state[f"blocks.{layer}.{name}.weight"] = normal(*shape)
            state[f"blocks.{layer}.{name}.bias"] = normal(shape[0])
        for name in ("ln1", "ln2"):
            state[f"blocks.{layer}.{name}.weight"] = 1 + normal(WIDTH)
            state[f"blocks.{layer}.{name}.bias"] = normal(WIDTH)
    return PublishedGPT(state, num_unmasked)


def gpt_yaml(gpt: PublishedGPT) -> dict[str, Any]:
    """What a model.yaml says about it."""
    table, block = len(gpt.state["tok_emb.weight"]), gpt.state["pos_emb"].shape[1]
    return {
        "target": "taming.modules.transformer.mingpt.GPT",
        "params": {
            "vocab_size": table,
            "block_size": block,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_embd": WIDTH,
            "n_unmasked": gpt.num_unmasked,
        },
    }


def checkpoint_of(
    gpt: PublishedGPT,
    first: VQModel,
    second: VQModel | None = None,
    *,
    order: Tensor | None = None,
    masks: bool = True,
) -> dict[str, Tensor]:
    """The state dict of a whole published model; `order` (N,) is its permuter's."""
    state = {f"transformer.{key}": value for key, value in gpt.state.items()}
    if masks:
        size = gpt.state["pos_emb"].shape[1]
        mask = torch.ones(size, size).tril()
        mask[: gpt.num_unmasked, : gpt.num_unmasked] = 1
        state |= {f"transformer.blocks.{layer}.attn.mask": mask[None, None] for layer in range(LAYERS)}
    state |= {f"first_stage_model.{key}": value for key, value in first.state_dict().items()}
    if second is not None:
        state |= {f"cond_stage_model.{key}": value for key, value in second.state_dict().items()}
    if order is not None:
        state |= {"permuter.forward_shuffle_idx": order, "permuter.backward_shuffle_idx": order.argsort()}
    return state


def container_yaml(
    gpt: PublishedGPT, first: VQModel, condition: Any, key: str, target: str = "", **params: Any
) -> dict[str, Any]:
    """A model.yaml of the whole; `condition` is its cond_stage_config."""
    model = published_yaml(first, *([target] if target else []))["model"]
    first_stage = {"target": model["target"], "params": model["params"]}
    values = {
        "cond_stage_key": key,
        "transformer_config": gpt_yaml(gpt),
        "first_stage_config": first_stage,
        "cond_stage_config": condition,
        **params,
    }
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": "taming.models.cond_transformer.Net2NetTransformer",
            "params": values,
        }
    }


Change = Callable[[dict[str, Any], dict[str, Any]], None]
"""Spoils (state, yaml) in place."""
