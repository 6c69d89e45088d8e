"""Norms of tokens, all called norm(x, style) so that a block can have any of them."""

from __future__ import annotations

from torch import Tensor, nn


class TokenLayerNorm(nn.LayerNorm):
    """Layer normalisation over D (Ba et al. 2016, arXiv:1607.06450); the style is ignored."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return super().forward(x)


class PixelNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) over D, nothing learned (Karras et al. 2018, arXiv:1710.10196, 4.2)."""

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x * (x.float().square().mean(-1, keepdim=True) + 1e-8).rsqrt().to(x.dtype)


class NoNorm(nn.Module):
    """x as it is."""

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return x
