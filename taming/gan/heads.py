"""What stands at the end of a discriminator.

Axes: B pictures, N tokens (h w cells), D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from taming.layers.equalised import EqualisedLinear
from taming.layers.linears import LinearKind, make_linear
from taming.layers.spectral_norm import spectral_norm


class ProjectionHead(nn.Module):
    """One logit a picture: linear(h) + <embed(y), h> (Miyato and Koyama 2018, arXiv:1802.05637).

    Without classes it is the linear part alone. The table's weights are of the same kind as the linear's:
    those of an equalised one are scaled by the root of D.
    """

    def __init__(self, width: int, num_classes: int | None, linear: LinearKind = "plain") -> None:
        super().__init__()
        self.linear = make_linear(linear, width, 1)
        self.embed: nn.Embedding | None = None
        self.gain = 1.0
        if num_classes is not None:
            self.embed = nn.Embedding(num_classes, width)
            if isinstance(self.linear, EqualisedLinear):
                nn.init.normal_(self.embed.weight)
                self.gain = self.linear.gain
            elif linear == "plain":
                nn.init.trunc_normal_(self.embed.weight, std=0.02, a=-0.04, b=0.04)
            else:
                nn.init.xavier_uniform_(self.embed.weight)
                spectral_norm(self.embed, keep_initial=linear == "improved_spectral")

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, D), classes (B,) int64 -> (B, 1); `y` is ignored where there are no classes."""
        logits: Tensor = self.linear(features)
        if self.embed is None:
            return logits
        assert y is not None, "a conditional discriminator judges pictures with their classes"
        agreement = (self.embed(y) * features).sum(1, keepdim=True)
        return logits + self.gain * agreement


class TokenHead(nn.Module):
    """One logit a token: each part of the picture gets a verdict of its own."""

    def __init__(self, width: int, linear: LinearKind = "plain") -> None:
        super().__init__()
        self.linear = make_linear(linear, width, 1)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) of a grid (h, w) -> (B, 1, h, w)."""
        logits: Tensor = self.linear(tokens)
        return rearrange(logits, "b (h w) 1 -> b 1 h w", h=grid[0], w=grid[1])


class ClassToken(nn.Module):
    """A learned token before all others, in which a transformer gathers its verdict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) -> (B, 1 + N, D)."""
        return torch.cat((self.token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens), dim=1)
