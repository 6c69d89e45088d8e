"""Causal self-attention with a preallocated key/value cache.

Axes: B sequences, T positions of this call, L positions so far, P prefix positions, H heads, C channels of
a head, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from taming.layers.position import Rotation, rotate
from taming.layers.rms_norm import RMSNorm


@dataclass(frozen=True)
class Positions:
    """Where each input position lies, for prefix and cells together: P + h * w of them."""

    embedding: Tensor | None
    """([B,] P + h * w, D) learned positions, or None."""
    rotation: Rotation | None
    """(cos, sin), each ([B, 1,] P + h * w, C / 2), or None."""

    def rotation_of(self, start: int, stop: int) -> Rotation | None:
        return (
            None
            if self.rotation is None
            else (
                self.rotation[0][..., start:stop, :],
                self.rotation[1][..., start:stop, :],
            )
        )


@dataclass
class KVCache:
    """Keys and values of one batch of sequences, written in place, one (B, H, L_max, C) pair a layer."""

    keys: list[Tensor]
    values: list[Tensor]
    positions: Positions
    prefix_length: int
    cells: Tensor | None
    """(B or 1, h * w, D) in the order of writing: what is added to the input that predicts each cell."""
    prefix_mask: Tensor | None
    """(B, P) bool where some prefix position must not be attended, else None."""
    visible: Tensor | None = None
    """(B, 1, 1, L_max) bool: what every code may attend to, where there is a prefix mask, else None."""
    length: int = 0
    """Input positions whose keys and values are there."""

    @property
    def num_codes(self) -> int:
        """How many codes the cache has taken in."""
        return self.length - self.prefix_length


@dataclass(frozen=True)
class Attend:
    """How the T positions of one call attend; the same for every layer."""

    start: int = 0
    rotation: Rotation | None = None
    mask: Tensor | None = None
    """bool, broadcast to (B, H, T, start + T), True = attend; None: causal from `start`."""
    causal: bool = True
    """Only read where there is no mask: False means that all positions are attended."""
    cache: KVCache | None = None
    last: Tensor | None = None
    """(B,) int64: the one position a sequence that the last block answers; None: the last one."""


@dataclass(frozen=True)
class AttendOne:
    """How the one position of a decoding step attends; the same for every layer.

    `position` is a number, and only what is written so far is read; or it is a tensor (1,) int64, all of the
    cache is read, and shapes are those of every other step, as a captured graph needs them.
    """

    cache: KVCache
    position: int | Tensor
    rotation: Rotation | None
    """(cos, sin), each ([B, 1, 1,] C / 2)."""
    mask: Tensor | None
    """Broadcast to (B, H, 1, keys), bool or added to the scores; None: all are attended."""

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value (B, H, C); returns those that are read, (B, H, keys, C) each."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if isinstance(self.position, Tensor):
            keys.index_copy_(2, self.position, key[:, :, None])
            values.index_copy_(2, self.position, value[:, :, None])
            return keys, values
        keys[:, :, self.position], values[:, :, self.position] = key, value
        return keys[:, :, : self.position + 1], values[:, :, : self.position + 1]


def one_rotation(rotation: Rotation, position: int | Tensor) -> Rotation:
    """(cos, sin) of one position, each ([B, 1,] T, C / 2) -> ([B, 1, 1,] C / 2), for `AttendOne`."""
    if isinstance(position, Tensor):
        cos, sin = (table.index_select(-2, position).squeeze(-2) for table in rotation)
    else:
        cos, sin = (table[..., position, :] for table in rotation)
    return (cos, sin) if cos.ndim == 1 else (cos[:, None], sin[:, None])


def attention_mask(
    prefix_mask: Tensor | None, num_unmasked: int, start: int, length: int, device: torch.device
) -> Tensor | None:
    """The mask of positions start..start+length-1 over all before, or None where plain causality is meant.

    A masked prefix position is attended by none but itself: a row of the softmax must not be empty, and
    what it makes of itself is read by nobody. Returns (B or 1, 1, length, start + length) bool.
    """
    needs_unmasked = num_unmasked > 1 and start < num_unmasked
    if prefix_mask is None and not needs_unmasked and (start == 0 or length == 1):
        return None
    query = torch.arange(start, start + length, device=device)[:, None]
    key = torch.arange(start + length, device=device)[None, :]
    allowed = key <= query
    if needs_unmasked:
        allowed = allowed | ((query < num_unmasked) & (key < num_unmasked))
    if prefix_mask is None:
        return allowed[None, None]
    visible = prefix_mask.new_ones(prefix_mask.shape[0], start + length)
    prefix_length = min(prefix_mask.shape[1], start + length)
    visible[:, :prefix_length] = prefix_mask[:, :prefix_length]
    return ((allowed[None] & visible[:, None]) | (key == query)[None])[:, None]


class AttentionProjections(nn.Module):
    """What every attention here has: one fused projection of queries, keys and values, and one back."""

    def __init__(self, width: int, heads: int, *, bias: bool, qk_norm: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)
        self.query_norm = RMSNorm(width // heads) if qk_norm else None
        self.key_norm = RMSNorm(width // heads) if qk_norm else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> queries, keys and values (B, H, T, C), not yet turned."""
        query, key, value = rearrange(self.qkv(x), "b t (three h c) -> three b h t c", three=3, h=self.heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value


class CausalAttention(AttentionProjections):
    """Multi-head attention of each position to all before it."""

    def forward(self, x: Tensor, attend: Attend, layer: int, *, only_last: bool = False) -> Tensor:
        """x (B, T, D) -> (B, T, D), or (B, 1, D) where only the last position's answer is wanted."""
        query, key, value = self.project(x)
        if attend.rotation is not None:
            query, key = rotate(query, attend.rotation), rotate(key, attend.rotation)
        if attend.cache is not None:
            stop = attend.start + x.shape[1]
            keys, values = attend.cache.keys[layer], attend.cache.values[layer]
            keys[:, :, attend.start : stop] = key
            values[:, :, attend.start : stop] = value
            key, value = keys[:, :, :stop], values[:, :, :stop]
        mask, causal = attend.mask, attend.causal
        if only_last:
            query, mask, causal = _last_query(query, mask, attend.last, key.shape[2])
        dropout = self.dropout if self.training else 0.0
        causal = causal and mask is None and query.shape[2] > 1
        if causal and _short_bf16_training(query):
            out = _causal_with_matrix(query, key, value, dropout)
        else:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal
            )
        projected: Tensor = self.proj(rearrange(out, "b h t c -> b t (h c)"))
        return projected

    def step(self, x: Tensor, attend: AttendOne, layer: int) -> Tensor:
        """`forward` for one position a sequence, without what only longer calls need: (B, D) -> (B, D)."""
        # Views in place of einops: a step of a small model is a hundred microseconds a layer.
        qkv = self.qkv(x).view(x.shape[0], 3, self.heads, -1)
        pair, value = qkv[:, :2], qkv[:, 2]
        if self.query_norm is not None and self.key_norm is not None:
            pair = torch.stack((self.query_norm(qkv[:, 0]), self.key_norm(qkv[:, 1])), dim=1)
        if attend.rotation is not None:
            pair = rotate(pair, attend.rotation)
        keys, values = attend.write(layer, pair[:, 1], value)
        out = scaled_dot_product_attention(pair[:, 0, :, None], keys, values, attn_mask=attend.mask)
        projected: Tensor = self.proj(out.reshape(x.shape))
        return projected


def _last_query(
    query: Tensor, mask: Tensor | None, last: Tensor | None, length: int
) -> tuple[Tensor, Tensor | None, bool]:
    """The one query a sequence that is answered, and the mask of what it sees."""
    if last is None:
        return query[:, :, -1:], None if mask is None else mask[:, :, -1:], False
    rows = torch.arange(query.shape[0], device=query.device)
    seen = (torch.arange(length, device=query.device)[None, :] <= last[:, None])[
        :, None, None
    ]  # (B, 1, 1, L)
    if mask is not None:
        seen = seen & mask.expand(query.shape[0], -1, -1, -1)[rows, :, last][:, :, None]
    return query[rows, :, last][:, :, None], seen, False


def _short_bf16_training(query: Tensor) -> bool:
    """Where torch's fused attention is slower than two products with the matrix held.

    Its bf16 backward on a CPU takes 2.5 times as long at 256 positions (4 x 8 heads, two cores), and as long
    at 512.
    """
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and query.requires_grad
        and query.shape[2] <= 384
    )


def _causal_with_matrix(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """Causal attention of (B, H, T, C) by its matrix (B H, T, T)."""
    batch, length, scale = query.shape[0], query.shape[2], query.shape[3] ** -0.5
    query, key, value = (rearrange(x, "b h t c -> (b h) t c") for x in (query, key, value))
    later = query.new_full((length, length), float("-inf")).triu(1)
    weights = torch.baddbmm(later[None], query, key.transpose(1, 2), alpha=scale).softmax(dim=-1)
    out = torch.bmm(functional.dropout(weights, dropout), value)
    return rearrange(out, "(b h) t c -> b h t c", b=batch)
