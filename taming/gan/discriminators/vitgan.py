"""ViTGAN's discriminator (Lee et al. 2021, arXiv:2107.04589): a vision transformer that is held back.

A plain vision transformer outlearns its generator. Overlapping patches, attention by distances (Kim et al.
2021, arXiv:2006.04710) and weights whose spectral norm stays what it was at the start keep its answers
smooth; a penalty on its gradient (R1) is reported to harm it.

Axes: B pictures, C channels, H W pixels, P patch size, N tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.gan.heads import ClassToken, ProjectionHead
from taming.layers.linears import LinearKind
from taming.layers.patch_embedding import PatchEmbedding
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import TokenLayerNorm


class ViTGANDiscriminatorConfig(Config):
    """The published one at 32 px; at 64 px it has 6 blocks and patches of 8."""

    kind: Literal["vitgan"] = "vitgan"
    takes_classes: ClassVar[bool] = True
    width: int = Field(default=384, ge=1)
    num_heads: int = Field(default=6, ge=1)
    depth: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=4, ge=1)
    overlap: int | None = Field(default=None, ge=0)
    """Pixels that a token sees beyond each side of its patch; None: half of the patch."""
    scores: Literal["l2_tied", "l2_kim", "dot"] = "l2_tied"
    """Attention by distances with one projection for queries and keys, as published; in Kim's form, the only
    one that is Lipschitz for any input; or by dot products."""
    linear: LinearKind = "improved_spectral"
    """Of every projection. improved_spectral: the spectral norm of the start stays; spectral: it is one."""
    head: Literal["class_token", "tokens"] = "class_token"
    """One logit a picture, as published; or one for each patch, as stage one may want."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; choose a multiple"
            )
        return self

    @property
    def smallest_size(self) -> int:
        """Pixels a side from which there is a logit."""
        return self.patch_size

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        if height % self.patch_size or width % self.patch_size:
            return (
                f"vitgan's discriminator cuts pictures into patches of {self.patch_size} pixels, which "
                f"{height}x{width} is not divisible by; use another patch_size or size"
            )
        return None


class ViTGANDiscriminator(nn.Module):
    """Pictures (B, in_channels, *size)[, classes (B,) int64] -> logits (B, 1), positive for real.

    With the head of tokens (B, 1, H / P, W / P).
    """

    def __init__(
        self,
        config: ViTGANDiscriminatorConfig,
        in_channels: int = 3,
        size: tuple[int, int] = (32, 32),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        width, linear = config.width, config.linear
        overlap = config.patch_size // 2 if config.overlap is None else config.overlap
        self.embedding = PatchEmbedding(in_channels, width, config.patch_size, overlap=overlap, linear=linear)
        h, w = self.embedding.grid(*size)
        self.grid = (h, w)
        self.class_token = ClassToken(width) if config.head == "class_token" else None
        num_tokens = h * w + (self.class_token is not None)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_tokens, width), std=0.02))
        self.blocks = nn.ModuleList(
            TokenBlock(
                MultiHeadAttention(width, config.num_heads, scores=config.scores, linear=linear),
                TokenMLP(width, int(config.mlp_ratio * width), linear=linear),
                TokenLayerNorm(width),
                TokenLayerNorm(width),
            )
            for _ in range(config.depth)
        )
        self.norm = TokenLayerNorm(width)
        self.head = ProjectionHead(width, num_classes, linear)

    def forward(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.embedding(images)
        if self.class_token is not None:
            x = self.class_token(x)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        if self.class_token is not None:
            logits: Tensor = self.head(self.norm(x[:, 0]), y)
            return logits
        # Each token is judged by itself, with the picture's class.
        classes = None if y is None else y.repeat_interleave(x.shape[1])
        logits = self.head(rearrange(self.norm(x), "b n d -> (b n) d"), classes)
        return rearrange(logits, "(b h w) 1 -> b 1 h w", h=self.grid[0], w=self.grid[1])
