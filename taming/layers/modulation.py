"""Norms of tokens whose scale and shift a style decides, called norm(x, style).

Axes: B pictures, N tokens, D width, S style.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.layers.linears import LinearKind, make_linear


class SelfModulatedLayerNorm(nn.Module):
    """(1 + gamma(w)) (x - mean) / deviation + beta(w), mean and deviation of each token over D.

    Gamma and beta are linear in the style w (ViTGAN, Lee et al. 2021, arXiv:2107.04589; after Chen et
    al. 2019, arXiv:1810.01365).
    """

    def __init__(
        self, width: int, style_dim: int, *, linear: LinearKind = "plain", eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.linear = make_linear(linear, style_dim, 2 * width)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        """(B, N, D), (B, S) -> (B, N, D)."""
        assert style is not None, "a self-modulated norm needs a style"
        gamma, beta = self.linear(style)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return F.layer_norm(x, (self.width,), eps=self.eps) * (1 + gamma) + beta


class TokenAdaIN(nn.Module):
    """AdaIN-T: (1 + gamma(w)) (x - mean) / deviation + beta(w), of each channel over a picture's tokens.

    STransGAN's (Xu et al. 2021, arXiv:2110.13107), after Huang and Belongie 2017 (arXiv:1703.06868). How
    large a channel was on average is forgotten: the style alone decides it.
    """

    def __init__(
        self, width: int, style_dim: int, *, linear: LinearKind = "plain", eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.eps = eps
        self.linear = make_linear(linear, style_dim, 2 * width)

    def forward(self, x: Tensor, style: Tensor | None) -> Tensor:
        """(B, N, D), (B, S) -> (B, N, D). Raises ValueError for one token, of which nothing would be left."""
        assert style is not None, "AdaIN-T needs a style"
        if x.shape[1] < 2:
            raise ValueError("AdaIN-T normalises over tokens: a single one would become zero")
        gamma, beta = self.linear(style)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        variance, mean = torch.var_mean(x.float(), dim=1, correction=0, keepdim=True)
        normalised = (x - mean) * (variance + self.eps).rsqrt()
        return (normalised * (1 + gamma) + beta).to(x.dtype)
