"""Text as a condition: a prefix position a word or token, masked where a caption is shorter.

A prefix is [words | padding, masked | start]. The start is learned, attended always, and predicts the first
code.

Axes: B captions, L words or tokens at most, E features of the encoder, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.conditions.base import Condition, Grid
from stage2_ar.conditions.text_config import TextConditionConfig, TransformersTextConfig
from stage2_ar.text_encoder import FrozenTextEncoder
from taming.data.dataset import PictureDataset
from taming.errors import ConfigError, UserError
from taming.types import Batch, Prefix


class TextCondition(Condition):
    """What both encoders share; they say how a caption becomes L positions and which of them are there."""

    keys: Mapping[str, str] = {"text": "text"}

    def __init__(self, config: TextConditionConfig, *, width: int) -> None:
        super().__init__(config.dropout)
        self.max_length = config.encoder.max_length
        self.start = nn.Parameter(torch.randn(width) * 0.02)
        self.null_embedding = nn.Parameter(torch.randn(width) * 0.02) if self.has_null else None
        # The caption as a whole is told to every cell too: attention finds words late in a short training.
        self.pooled_norm = nn.LayerNorm(width)
        self.pooled_out = nn.Linear(width, width)
        nn.init.normal_(self.pooled_out.weight, std=0.02 / width**0.5)
        nn.init.zeros_(self.pooled_out.bias)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B captions -> (B, L, D), and (B, L) bool: which positions are there. Longer ones are cut."""

    @abstractmethod
    def check_text(self, text: str) -> None:
        """Raises UserError where a user's text cannot be said in full."""

    def prefix_length(self, grid: Grid) -> int:
        return self.max_length + 1

    def check(self, batch: Batch, grid: Grid) -> None:
        if "text" not in batch:
            raise UserError("the text condition needs captions; the data has none")
        for text in batch["text"]:
            if not isinstance(text, str):
                raise UserError(f"a caption is {text!r}, not a text")

    def check_data(self, data: PictureDataset) -> None:
        if "text" not in data.provides:
            raise UserError(
                "condition.kind=text needs captions, and the data has none; set data.text to a folder of "
                "NAME.txt files or a JSON of COCO captions"
            )

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        positions, mask = self.encode(batch["text"])
        # Zeros, so that not even a learned position's company is told about what is not there.
        positions = positions.masked_fill(~mask[..., None], 0.0)
        start = self.start.expand(len(positions), 1, -1)
        pooled = positions.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = self.pooled_out(self.pooled_norm(pooled))
        return Prefix(
            torch.cat((positions, start), dim=1),
            functional.pad(mask, (0, 1), value=True),
            cells=repeat(pooled, "b d -> b h w d", h=grid[0], w=grid[1]),
        )

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this text condition was trained without dropout: it has no null to guide away from"
            )
        null = self.null_embedding.to(device)
        embeddings = functional.pad(null.expand(batch_size, 1, -1), (0, 0, self.max_length, 0))
        mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool, device=device)
        mask[:, -1] = True
        cells = torch.zeros(batch_size, *grid, len(null), dtype=null.dtype, device=device)
        return Prefix(embeddings, mask, cells=cells)

    def read_value(self, name: str, value: Any, device: torch.device | str) -> Any:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError("condition 'text' must be a text or a list of texts")
        for text in texts:
            if not text.strip():
                raise UserError("condition 'text' is empty; say what to paint")
            self.check_text(text)
        return list(texts)


class EncodedTextCondition(TextCondition):
    """The last hidden states of a frozen encoder of the transformers library, projected.

    The encoder is no part of the weights: a saved pipeline holds a copy of it in text_encoder/, so that who
    loads it needs neither the hub nor the folder that it was trained with.
    """

    def __init__(self, config: TextConditionConfig, encoder: TransformersTextConfig, *, width: int) -> None:
        super().__init__(config, width=width)
        if encoder.hidden_size is None or encoder.weights_hash is None:
            raise ConfigError(
                "condition.encoder has no hidden_size and weights_hash: they are filled in when training "
                "begins; build the model from a config that training saved"
            )
        self.encoder = FrozenTextEncoder(
            encoder.name, max_length=encoder.max_length, expected_hash=encoder.weights_hash
        )
        self.disk_cache = encoder.disk_cache
        self.norm = nn.LayerNorm(encoder.hidden_size)
        self.out = nn.Linear(encoder.hidden_size, width)
        # At the scale of the codes' embeddings, so that neither drowns the other at first.
        nn.init.normal_(self.out.weight, std=0.02 / encoder.hidden_size**0.5)
        nn.init.zeros_(self.out.bias)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        weight = self.out.weight
        features, mask = self.encoder.padded(texts, weight.device)
        return self.out(self.norm(features.to(weight.dtype))), mask

    def check_text(self, text: str) -> None:
        self.encoder.check_length(text)

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"text": ["a picture"] * batch_size}


def text_encoders(condition: nn.Module) -> list[FrozenTextEncoder]:
    """The frozen encoders of a condition and its parts: what a pipeline keeps beside the weights."""
    return [part.encoder for part in condition.modules() if isinstance(part, EncodedTextCondition)]


def keep_features_in(condition: nn.Module, run: Path) -> None:
    """Let a condition keep the features of captions in a run's folder, where its config wants it."""
    for part in condition.modules():
        if isinstance(part, EncodedTextCondition) and part.disk_cache:
            part.encoder.disk_cache = run / "text_features"
