"""What every quantizer offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from taming.types import QuantizerOutput


class Quantizer(nn.Module, ABC):
    """Latents (B, code_dim, h, w) to one index a cell, and back.

    A method that combines several codes in a cell folds them into one index in [0, codebook_size).
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.code_dim = code_dim

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """(codebook_size, code_dim), row i what index i decodes to."""

    @abstractmethod
    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantise (B, code_dim, h, w) of any float dtype; the output is fp32."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 -> (B, code_dim, h, w); in eval mode equal to what forward returned."""

    def after_step(self) -> None:
        """Called once after every optimiser step: moves and revives codes where the method does so itself.

        All processes call it together, and leave it with the same codes.
        """
