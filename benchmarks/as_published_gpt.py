"""The transformer as it was published works, for comparison: same numbers, more work.

Queries, keys and values by three projections, attention with its matrix held and masked, the head over all
positions, no cache. It takes its weights from ours, so that both can be checked to say the same.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig

SIZES = {"small": (8, 512, 8), "large": (24, 1024, 16)}
"""Layers, width, heads: of the tables in docs, and of the published FacesHQ, D-RIN and S-FLCKR models."""
VOCABULARY = 1024


def our_gpt(size: str, *, prefix_length: int) -> Transformer:
    """Ours with random weights, for 16 x 16 codes."""
    layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    config = GPTConfig(num_layers=layers, width=width, num_heads=heads)
    return build_transformer(config, vocabulary_size=VOCABULARY, grid=(16, 16), prefix_length=prefix_length)


class PublishedAttention(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(block_size, block_size).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = (query @ key.transpose(-2, -1)) / math.sqrt(key.shape[-1])
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        out = functional.softmax(scores, dim=-1) @ value
        return self.proj(out.transpose(1, 2).contiguous().view(batch, length, width))


class PublishedBlock(nn.Module):
    def __init__(self, width: int, heads: int, block_size: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = PublishedAttention(width, heads, block_size)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class PublishedGPT(nn.Module):
    """Inputs (B, T) tokens, with the condition's before the codes -> logits (B, T, V)."""

    def __init__(self, ours: Transformer) -> None:
        super().__init__()
        config = ours.config
        assert ours.position_embedding is not None
        block_size = ours.position_embedding.shape[1]
        self.tok_emb = nn.Embedding(ours.vocabulary_size, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, block_size, config.width))
        blocks = (
            PublishedBlock(config.width, config.num_heads, block_size) for _ in range(config.num_layers)
        )
        self.blocks = nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, ours.vocabulary_size, bias=False)
        masks = {key: value for key, value in self.state_dict().items() if key.endswith("attn.mask")}
        self.load_state_dict(published_from_ours(ours.state_dict()) | masks)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb[:, : tokens.shape[1]]
        return self.head(self.ln_f(self.blocks(x)))


def published_from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "token_embedding.weight": "tok_emb.weight",
        "position_embedding": "pos_emb",
        "norm1.": "ln1.",
        "norm2.": "ln2.",
        "attention.proj.": "attn.proj.",
        "mlp.up.": "mlp.0.",
        "mlp.down.": "mlp.2.",
    }
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attention.qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[key.replace(".attention.qkv.", f".attn.{name}.")] = part
            continue
        for ours, published in names.items():
            key = key.replace(ours, published)
        renamed[f"ln_f.{key.removeprefix('norm.')}" if key.startswith("norm.") else key] = value
    return renamed


def interleaved(contenders: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median rate of each contender, run in turn so that a slow minute hurts all alike.

    A contender returns its own rate (tokens a second).
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            rates[name].append(run())
    return {name: statistics.median(values) for name, values in rates.items()}


def read_bandwidth(megabytes: int = 256) -> float:
    """Bytes a second at which a matrix of this size is read: a matrix-vector product.

    256 MB are read from memory; a part of fewer may rest in a large cache, as a small model's weights do.
    """
    matrix, vector = torch.ones(max(megabytes * 64, 1), 4096), torch.ones(4096)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        torch.mv(matrix, vector)
        times.append(time.perf_counter() - start)
    return matrix.numel() * 4 / statistics.median(times)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
