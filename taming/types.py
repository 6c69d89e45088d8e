"""The words that all packages share. No logic lives here.

Axes: B pictures, C channels, H W pixels, h w latent cells, K codes, D code or model width,
P prefix positions, N cells in sampling order (h * w).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Any]
"""One batch of samples. Keys, each present only where the data has it:

image            (B, C, H, W) uint8 from the loader (float in [-1, 1] where files hold more than 8 bits),
                 float in [-1, 1] inside a step
codes            (B, h, w) int64 in place of image, where a data set was encoded before
label            (B,) int64, the class of the whole picture
segmentation     (B, H, W) int64, one label a pixel
depth            (B, 1, H, W) float in [0, 1], 1 is nearest (inverse depth)
condition_image  (B, C, H, W) as image: any second picture
low_resolution   (B, C, h', w') as image: the picture in fewer pixels
edges            (B, 1, H, W) float in [0, 1], 1 on an edge
crop             (B, 4) float in [0, 1]: (x0, y0, x1, y1) of the sample's frame in its whole picture, which is
                 mirrored where the sample is; given by data that crops
objects          list of B lists of dicts {"label": int, "box": (x0, y0, x1, y1) in [0, 1]}
text             list of B strings
key              list of B strings that name the samples
chance           (seed, step): what is drawn at random in training is a function of it and of `key`
"""


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer makes of latents (B, D, h, w)."""

    quantized: Tensor
    """(B, D, h, w); its gradient goes straight through to the latents."""
    indices: Tensor
    """(B, h, w) int64 in [0, codebook_size)."""
    loss: Tensor
    """() already weighted; 0 where the method has none."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Detached () values for the log."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The facts about a tokenizer that a transformer or another program must know."""

    codebook_size: int
    code_dim: int
    downsample_factor: int
    in_channels: int = 3
    pixel_range: tuple[float, float] = (-1.0, 1.0)


class Tokenizer(Protocol):
    """Pictures to codes and back."""

    spec: TokenizerSpec

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, h, w) int64."""
        ...

    def decode(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, C, H, W) in [-1, 1]."""
        ...


Segment = int | tuple[int, int]
"""A part of a prefix: so many positions about the whole picture, or one position a cell of a grid."""


@dataclass(frozen=True)
class Prefix:
    """What a condition says to the transformer."""

    embeddings: Tensor
    """(B, P, D), P >= 1: positions that stand before the first code."""
    mask: Tensor
    """(B, P) bool, True = attend."""
    cells: Tensor | None = None
    """(B, h, w, D) or None: added to the input that predicts each cell, so that a condition which is
    aligned with the picture does not lengthen the sequence."""
    segments: tuple[Segment, ...] | None = None
    """What the P positions are, one part after another: a number n stands for n positions that speak of the
    picture as a whole, a pair (h, w) for the cells of such a grid in raster order. None: (P,). It tells
    positions where they lie, and which of them belong to a window of the picture."""
