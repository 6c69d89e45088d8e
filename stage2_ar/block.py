"""One block of the transformer.

Axes: B sequences, T input positions of a call, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stage2_ar.attention import Attend, AttendOne, CausalAttention
from stage2_ar.transformer_config import GPTConfig, LlamaConfig
from stage2_ar.windowed_attention import WindowAttend, WindowedAttention
from taming.layers.rms_norm import RMSNorm
from taming.layers.swiglu import swiglu


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig | LlamaConfig) -> None:
        super().__init__()
        gpt = isinstance(config, GPTConfig)
        self.norm1: nn.Module = nn.LayerNorm(config.width) if gpt else RMSNorm(config.width)
        self.norm2: nn.Module = nn.LayerNorm(config.width) if gpt else RMSNorm(config.width)
        windowed = isinstance(config, LlamaConfig) and config.attention_window is not None
        self.attention: nn.Module = (WindowedAttention if windowed else CausalAttention)(
            config.width,
            config.num_heads,
            bias=gpt,
            qk_norm=isinstance(config, LlamaConfig) and config.qk_norm,
            dropout=config.attention_dropout,
        )
        if isinstance(config, GPTConfig):
            self.mlp: nn.Module = GELUMLP(config.width, 4 * config.width)
        else:
            self.mlp = SwiGLUMLP(config.width, config.hidden_width)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        x: Tensor,
        attend: Attend | WindowAttend,
        layer: int,
        *,
        keep_from: int = 0,
        only_last: bool = False,
    ) -> Tensor:
        """x (B, T, D) -> (B, T - keep_from, D), or (B, 1, D) where only the last position is answered."""
        attended = self.attention(self.norm1(x), attend, layer, only_last=only_last)
        if only_last and isinstance(attend, Attend) and attend.last is not None:
            x = x[torch.arange(x.shape[0], device=x.device), attend.last][:, None]
        elif only_last:
            x = x[:, -1:]
        elif keep_from:
            # Nothing reads the earlier positions of the last block again.
            x, attended = x[:, keep_from:], attended[:, keep_from:]
        x = x + self.dropout(attended)
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out

    def step(self, x: Tensor, attend: AttendOne, layer: int) -> Tensor:
        """One position a sequence, in eval mode: (B, D) -> (B, D)."""
        assert isinstance(self.attention, CausalAttention)
        x = x + self.attention.step(self.norm1(x), attend, layer)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GELUMLP(nn.Module):
    """down(gelu(up(x))) with the exact GELU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden_width)
        self.down = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.gelu(self.up(x)))
        return out


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020), gate and up in one projection."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden_width, bias=False)
        self.down = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(swiglu(self.gate_up(x)))
        return out
