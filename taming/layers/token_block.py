"""One block of a transformer over a picture's tokens, with norms, shortcuts and activations to choose.

Axes: B pictures, N tokens, D width, S style.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from taming.layers.linears import LinearKind, make_linear
from taming.layers.token_attention import Grid, MultiHeadAttention


class TokenMLP(nn.Module):
    """down(activation(up(x))), (..., D) -> (..., D)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Literal["gelu", "leaky_relu"] = "gelu",
        linear: LinearKind = "plain",
    ) -> None:
        super().__init__()
        self.up = make_linear(linear, width, hidden)
        self.down = make_linear(linear, hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        out: Tensor = self.down(F.gelu(h) if self.activation == "gelu" else F.leaky_relu(h, 0.2))
        return out


class TokenBlock(nn.Module):
    """x <- P1 x + a(attention(norm1(x, style))); x <- P2 x + a(mlp(norm2(x, style))).

    P and a are identities unless given. Where given, `attention_norm` is applied to what the attention gives,
    and `trunk_norm` to x between the two halves, so that both the branch and the shortcut after it see its
    result. Probes find the shortcut of a half as the output of skip1 or skip2, and its branch as that of act1
    or act2.
    """

    def __init__(
        self,
        attention: MultiHeadAttention,
        mlp: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        *,
        skip1: nn.Module | None = None,
        skip2: nn.Module | None = None,
        branch_activation: type[nn.Module] | None = None,
        attention_norm: nn.Module | None = None,
        trunk_norm: nn.Module | None = None,
    ) -> None:
        """Norms are called with (x, style). `branch_activation()` is made for each half."""
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp
        self.skip1, self.skip2 = skip1 or nn.Identity(), skip2 or nn.Identity()
        self.act1, self.act2 = ((branch_activation or nn.Identity)() for _ in range(2))
        self.attention_norm, self.trunk_norm = attention_norm, trunk_norm

    def forward(
        self,
        x: Tensor,
        style: Tensor | None = None,
        *,
        grid: Grid | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, D)[, (B, S)] -> (B, N, D)."""
        attended = self.attention(self.norm1(x, style), grid=grid, mask=mask)
        if self.attention_norm is not None:
            attended = self.attention_norm(attended, style)
        x = self.skip1(x) + self.act1(attended)
        if self.trunk_norm is not None:
            x = self.trunk_norm(x, style)
        out: Tensor = self.skip2(x) + self.act2(self.mlp(self.norm2(x, style)))
        return out
