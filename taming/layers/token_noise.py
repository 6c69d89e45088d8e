"""Noise of learned strength on tokens (TransGAN as released; after StyleGAN, arXiv:1812.04948, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class NoisyNorm(nn.Module):
    """norm(x, style) + strength * one random number a token; the strength is learned, from 0.

    The numbers are drawn in train mode and a buffer in eval mode, so that a sample depends on nothing but
    what the generator is given.
    """

    def __init__(self, norm: nn.Module, num_tokens: int) -> None:
        super().__init__()
        self.norm = norm
        self.strength = nn.Parameter(torch.zeros(()))
        self.still: Tensor
        self.register_buffer("still", torch.randn(1, num_tokens, 1))

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """(B, N, D), and what the norm wants of a style -> (B, N, D)."""
        x = self.norm(x, style)
        noise = torch.randn_like(x[..., :1]) if self.training else self.still
        return x + self.strength * noise
