"""What every quantizer offers.

Axes: B pictures, D code width, h w cells, N = B h w cells as rows, K codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.types import QuantizerOutput

LARGEST_FIXED_CODEBOOK = 2**18
"""Most codes of a method whose number is a product: one more level or stage is soon a vocabulary that no
transformer can have."""


@dataclass(frozen=True)
class QuantizedRows:
    """What a method makes of latents (N, D): a `QuantizerOutput` before its cells form pictures again."""

    quantized: Tensor
    """(N, D), its gradient straight through to the latents."""
    indices: Tensor
    """(N,) int64."""
    loss: Tensor
    """() already weighted."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Detached () values for the log."""


class Quantizer(nn.Module, ABC):
    """Latents (B, code_dim, h, w) to one index a cell, and back; in fp32 whatever the autocast.

    A method is written for rows (N, code_dim): `quantize_rows`, `choose` and, where codes are not rows of a
    table, `codes_at`. One that combines several codes in a cell folds them into one index in
    [0, codebook_size).
    """

    row_tensors: ClassVar[tuple[str, ...]] = ()
    """State-dict names with one row a code; without any, the codes are a fixed grid that cannot be cut."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.code_dim = code_dim
        self.observing = True
        """Whether forward remembers in training what `after_step` needs."""

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(codebook_size, code_dim) fp32, row i what index i decodes to."""

    @abstractmethod
    def quantize_rows(self, rows: Tensor) -> QuantizedRows:
        """Quantise latents (N, code_dim) in fp32."""

    @abstractmethod
    def choose(self, rows: Tensor) -> Tensor:
        """Indices (N,) int64 of latents (N, code_dim) fp32, without chance."""

    def codes_at(self, indices: Tensor) -> Tensor:
        """(...) int64 -> (..., code_dim)."""
        return F.embedding(indices, self.codebook)

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantise (B, code_dim, h, w) of any float dtype; the output is fp32."""
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            rows = self.quantize_rows(rearrange(z.float(), "b d h w -> (b h w) d"))
        return QuantizerOutput(
            quantized=rearrange(rows.quantized, "(b h w) d -> b d h w", b=batch, h=height, w=width),
            indices=rearrange(rows.indices, "(b h w) -> b h w", b=batch, h=height, w=width),
            loss=rows.loss,
            terms=rows.terms,
        )

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """(B, code_dim, h, w) of any float dtype -> (B, h, w) int64: forward's indices in eval mode.

        Without chance and without effect on the quantizer, in training mode as well.
        """
        batch, _, height, width = z.shape
        with torch.autocast(z.device.type, enabled=False):
            indices = self.choose(rearrange(z.float(), "b d h w -> (b h w) d"))
        return rearrange(indices, "(b h w) -> b h w", b=batch, h=height, w=width)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, code_dim, h, w) fp32; in eval mode equal to what forward returned."""
        with torch.autocast(indices.device.type, enabled=False):
            return rearrange(self.codes_at(indices), "b h w d -> b d h w")

    def before_step(self, step: int, total_steps: int) -> None:
        """Called before training step `step` of `total_steps`: sets what follows a schedule.

        A function of its arguments alone, so that a resumed run needs no state for it.
        """

    def after_step(self) -> None:
        """Called once after every optimiser step: moves and revives codes where the method does so itself.

        All processes call it together, and leave it with the same codes: those that one process with all
        of their pictures would have, up to the rounding of what went before.
        """

    def forget_step(self) -> None:
        """Called in place of `after_step` for a step that is left out: as if it had not been begun."""

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Inside, forward leaves no trace: for a pass that repeats one already seen."""
        parts = [part for part in self.modules() if isinstance(part, Quantizer)]
        for part in parts:
            part.observing = False
        try:
            yield
        finally:
            for part in parts:
                part.observing = True
