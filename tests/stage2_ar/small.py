"""Small transformers and prefixes for tests."""

from __future__ import annotations

from functools import cache

import torch

from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from taming.types import Prefix

GRID = (3, 4)
VOCABULARY = 13
WIDTH = 16

CONFIGS: dict[str, GPTConfig | LlamaConfig] = {
    "gpt": GPTConfig(num_layers=2, num_heads=2, width=WIDTH),
    "gpt_unmasked": GPTConfig(num_layers=2, num_heads=2, width=WIDTH, num_unmasked=3),
    "llama": LlamaConfig(num_layers=2, num_heads=2, width=WIDTH),
    "llama_plain": LlamaConfig(num_layers=2, num_heads=2, width=WIDTH, qk_norm=False),
}


@cache
def small_transformer(kind: str, prefix_length: int = 3, grid: tuple[int, int] = GRID) -> Transformer:
    """A transformer in eval mode whose predictions differ from cell to cell."""
    torch.manual_seed(0)
    model = build_transformer(
        CONFIGS[kind], vocabulary_size=VOCABULARY, grid=grid, prefix_length=prefix_length
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.nn.init.normal_(model.token_embedding.weight, std=2.0)  # a code must matter to those after it
    return model


def random_prefix(batch: int, *, length: int = 3, grid: tuple[int, int] = GRID, seed: int = 0) -> Prefix:
    """A prefix with aligned cells."""
    generator = torch.Generator().manual_seed(seed)
    return Prefix(
        torch.randn(batch, length, WIDTH, generator=generator),
        torch.ones(batch, length, dtype=torch.bool),
        torch.randn(batch, *grid, WIDTH, generator=generator),
    )
