"""Captions in words of a fixed vocabulary, embedded by a table of their own.

Axes: B captions, L words at most, H heads, C hidden channels, D width.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from stage2_ar.conditions.base import Grid
from stage2_ar.conditions.text import EncodedTextCondition, TextCondition
from stage2_ar.conditions.text_config import TextConditionConfig, TransformersTextConfig, WordsConfig
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def build_text_condition(config: TextConditionConfig, *, width: int) -> TextCondition:
    """The condition of a config's encoder. Raises ConfigError where its facts are not filled in."""
    match config.encoder:
        case WordsConfig():
            return WordsCondition(config, config.encoder, width=width)
        case TransformersTextConfig():
            return EncodedTextCondition(config, config.encoder, width=width)


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; "it's" and "sea-side" are one each."""
    return _WORD.findall(text.lower())


def vocabulary_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Every word of some texts once, in the order of the alphabet."""
    return tuple(sorted({word for text in texts for word in words_of(text)}))


class WordsCondition(TextCondition):
    """A table of words, learned positions, and layers in which words see each other, later ones included.

    A word of a caption that the vocabulary does not have is passed over; in a user's text it is refused.
    """

    def __init__(self, config: TextConditionConfig, encoder: WordsConfig, *, width: int) -> None:
        super().__init__(config, width=width)
        hidden = encoder.hidden_width
        self.numbers = {word: number for number, word in enumerate(encoder.vocabulary)}
        # A table has a row at least, where the vocabulary is not filled in yet (a dry run, say).
        self.table = nn.Embedding(max(len(self.numbers), 1), hidden)
        self.positions = nn.Parameter(torch.randn(encoder.max_length, hidden) * 0.1)
        block = WordAttention if encoder.context == "attention" else WordConvolution
        self.context = nn.ModuleList(block(hidden) for _ in range(encoder.context_layers))
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, width)
        # At the scale of the codes' embeddings, so that neither drowns the other at first.
        nn.init.normal_(self.out.weight, std=0.02 / hidden**0.5)
        nn.init.zeros_(self.out.bias)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = [[self.numbers[word] for word in words_of(text) if word in self.numbers] for text in texts]
        index = torch.zeros(len(rows), self.max_length, dtype=torch.int64)
        mask = torch.zeros(len(rows), self.max_length, dtype=torch.bool)
        for number, row in enumerate(rows):
            kept = row[: self.max_length]
            index[number, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
            mask[number, : len(kept)] = True
        index, mask = index.to(self.start.device), mask.to(self.start.device)
        x = self.table(index) + self.positions
        for block in self.context:
            x = block(x, mask)
        return self.out(self.norm(x)), mask

    def check_text(self, text: str) -> None:
        words = words_of(text)
        for word in words:
            if word not in self.numbers:
                near = difflib.get_close_matches(word, self.numbers, n=3, cutoff=0.6)
                hint = f"near it are {', '.join(near)}" if near else f"it knows {_some(self.numbers)}"
                raise UserError(
                    f"the word {word!r} is not one of the {len(self.numbers)} that the model was trained "
                    f"with; {hint}"
                )
        if not words:
            raise UserError(f"the text {text!r} has no words; say what to paint")
        if len(words) > self.max_length:
            raise UserError(
                f"a text has {len(words)} words, but the model takes at most {self.max_length}; shorten it"
            )

    def check_data(self, data: PictureDataset) -> None:
        super().check_data(data)
        found = vocabulary_of(data.texts())
        if not any(word in self.numbers for word in found):
            raise UserError(
                f"the data's captions ({_some(found)}) have no word in common with the vocabulary "
                f"({_some(self.numbers)}); leave condition.encoder.vocabulary out to take the data's"
            )

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"text": [" ".join(list(self.numbers)[: self.max_length])] * batch_size}


class WordAttention(nn.Module):
    """Pre-norm attention and MLP of a transformer's encoder, four heads or one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = 4 if channels % 4 == 0 else 1
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, C), mask (B, L) bool -> (B, L, C)."""
        query, key, value = rearrange(
            self.qkv(self.norm1(x)), "b l (three h c) -> three b h l c", three=3, h=self.heads
        )
        # Each position sees itself too: without a word at all, a row of the softmax must not be empty.
        itself = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        seen = (mask[:, None, :] | itself)[:, None]  # (B, 1, L, L)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.proj(rearrange(attended, "b h l c -> b l (h c)"))
        out: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class WordConvolution(nn.Module):
    """x + conv3(gelu(norm(x))) over words, with zeros where none is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, C), mask (B, L) bool -> (B, L, C)."""
        there = functional.gelu(self.norm(x)) * mask[..., None]
        out: Tensor = x + rearrange(self.conv(rearrange(there, "b l c -> b c l")), "b c l -> b l c")
        return out


def _some(words: Iterable[str]) -> str:
    known = list(words)
    return ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
