"""ViTGAN's generator (Lee et al. 2021, arXiv:2107.04589): a transformer over the patches of the picture.

    w = mapping(z);  h = E_pos;  h = MSA(SLN(h, w)) + h;  h = MLP(SLN(h, w)) + h
    patch_i = f(E_fou, SLN(h, w)_i)

Noise reaches the picture through the self-modulated layer norms alone. In stage one the latents enter as
tokens, h = E_pos + latents, and w is a function of their mean.

Axes: B pictures, Z noise, C channels, N tokens (a grid h w of cells), D width, S style, P patch size.
"""

from __future__ import annotations

from typing import Literal, Self

from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.config import Config
from taming.errors import ConfigError
from taming.gan.generator import Generator, Painted, StemOutput, Trunk
from taming.gan.generators.mapping import MappingNetwork
from taming.gan.generators.patch_heads import ConvolutionalPatchHead, ImplicitPatchHead, PatchHead
from taming.layers.coordinates import CoordinateEncoding
from taming.layers.modulation import SelfModulatedLayerNorm
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP

LARGEST_IMPLICIT_PATCH = 15
"""From P = 16 on a token would have to hold 256 pixels or more, without a look at its neighbours."""


class ViTGANGeneratorConfig(Config):
    """The published one at 32 px; at 64 px it has 6 blocks and patches of 8."""

    kind: Literal["vitgan"] = "vitgan"
    noise_dim: int = Field(default=384, ge=1)
    width: int = Field(default=384, ge=1)
    num_heads: int = Field(default=6, ge=1)
    depth: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=4, ge=1)
    """Pixels a side of what a token paints. As a decoder of stage one: pixels a side of a latent, instead."""
    linear: Literal["plain", "equalised"] = "equalised"
    """Of attention and MLP. plain: the blocks change little at first, and tokens know where they are."""
    modulation: Literal["plain", "equalised"] = "equalised"
    """Of what the style does to the layer norms. plain: little at first. The mapping network and the heads
    are equalised whatever is chosen here."""
    style_dim: int = Field(default=384, ge=1)
    mapping_layers: int = Field(default=2, ge=1)
    """Unpublished; two as StyleGAN2-ADA has at this size."""
    head: Literal["auto", "implicit", "convolutional"] = "auto"
    """Tokens to pixels: a function of the place within the patch, or StyleGAN2's modulated convolutions,
    which the authors recommend where convergence should be quick. auto: implicit for P < 16."""
    implicit_width: int | None = Field(default=None, ge=1)
    """Of the implicit function; None: that of the transformer."""
    demodulate: bool = True
    """Bring the modulated weights of the implicit function's first layer to length one; unpublished. Where
    they are not, it learns plain patches of any colour sooner."""
    convolution_channels: int = Field(default=64, ge=1)
    """Of the convolutional head at the picture's size; twice as many a halving, up to the width."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not divisible by num_heads {self.num_heads}; choose a multiple"
            )
        if (reason := self._unsuited_patch(self.patch_size)) is not None:
            raise ValueError(f"patch_size {reason}")
        return self

    def head_for(self, patch_size: int) -> Literal["implicit", "convolutional"]:
        """What `head` means for patches of this size."""
        if self.head == "auto":
            return "implicit" if patch_size <= LARGEST_IMPLICIT_PATCH else "convolutional"
        return self.head

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be painted; None where they can."""
        if height % self.patch_size or width % self.patch_size:
            return (
                f"vitgan paints pictures in patches of {self.patch_size} pixels, which {height}x{width} is "
                "not divisible by; use another patch_size or size"
            )
        return None

    def _unsuited_patch(self, patch_size: int) -> str | None:
        if self.head_for(patch_size) == "convolutional" and patch_size & (patch_size - 1):
            return (
                f"{patch_size} is not a power of two, as the convolutional head needs; choose head: implicit"
            )
        return None


class ViTGANTrunk(Trunk):
    """Maps (B, in_channels, h, w) and styles (B, S) -> pictures (B, C, h P, w P).

    From noise the map has no channels: all is said by the style. From latents it has `config.width`, and the
    style, where none is given, is made of their mean.
    """

    def __init__(
        self,
        config: ViTGANGeneratorConfig,
        start: tuple[int, int],
        size: tuple[int, int],
        channels: int = 3,
        *,
        from_latents: bool,
    ) -> None:
        """Raises ConfigError where a patch is not square, or not one that the head can paint."""
        super().__init__(config.width if from_latents else 0, start, size)
        patch_size = _patch_size(config, start, size)
        width, style_dim = config.width, config.style_dim
        self.own_style = (
            MappingNetwork(width, style_dim, config.mapping_layers, normalised=False)
            if from_latents
            else None
        )
        self.position = CoordinateEncoding(width)
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.norm = SelfModulatedLayerNorm(width, style_dim, linear=config.modulation)
        self.head: PatchHead
        if config.head_for(patch_size) == "implicit":
            self.head = ImplicitPatchHead(
                width,
                channels,
                start,
                patch_size,
                width=config.implicit_width or width,
                demodulate=config.demodulate,
            )
        else:
            self.head = ConvolutionalPatchHead(
                width, style_dim, channels, start, patch_size, width=config.convolution_channels
            )

    def forward(self, features: Tensor, style: Tensor | None = None) -> Painted:
        if style is None:
            assert self.own_style is not None, "from noise, everything is said by the style"
            style = self.own_style(features.mean((2, 3)))
        drawn = self.head.draw(self.tokens(features, style), style)
        return Painted(self.head.paint(*drawn), tuple(tensor.detach() for tensor in drawn))

    def tokens(self, features: Tensor, style: Tensor) -> Tensor:
        """What the head paints: (B, N, D)."""
        grid = (features.shape[2], features.shape[3])
        position = self.position(*grid)  # (N, D)
        x = position.expand(len(features), *position.shape)
        if self.in_channels:
            x = x + rearrange(features, "b d h w -> b (h w) d")
        for block in self.blocks:
            x = block(x, style, grid=grid)
        tokens: Tensor = self.norm(x, style)
        return tokens

    @property
    def last_layer(self) -> nn.Parameter:
        return self.head.last_layer

    def paint(self, *features: Tensor) -> Tensor:
        return self.head.paint(*features)


class ViTGANStem(nn.Module):
    """Noise (B, Z)[, classes (B,)] -> a map without channels, and styles (B, S)."""

    def __init__(
        self, config: ViTGANGeneratorConfig, start: tuple[int, int], num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.start = start
        self.mapping = MappingNetwork(config.noise_dim, config.style_dim, config.mapping_layers, num_classes)

    def forward(self, z: Tensor, y: Tensor | None = None) -> StemOutput:
        style = self.mapping(z, y)
        return StemOutput(style.new_empty(len(z), 0, *self.start), style)


def generator(
    config: ViTGANGeneratorConfig, size: tuple[int, int], channels: int, num_classes: int | None
) -> Generator:
    """From noise to pictures (B, channels, *size)."""
    start = (size[0] // config.patch_size, size[1] // config.patch_size)
    return Generator(
        ViTGANStem(config, start, num_classes),
        ViTGANTrunk(config, start, size, channels, from_latents=False),
        config.noise_dim,
        num_classes,
    )


def trunk(
    config: ViTGANGeneratorConfig, start: tuple[int, int], size: tuple[int, int], channels: int
) -> Trunk:
    """From maps (B, config.width, *start) to pictures (B, channels, *size)."""
    return ViTGANTrunk(config, start, size, channels, from_latents=True)


def _block(config: ViTGANGeneratorConfig) -> TokenBlock:
    width, linear = config.width, config.linear
    return TokenBlock(
        MultiHeadAttention(width, config.num_heads, linear=linear),
        TokenMLP(width, int(config.mlp_ratio * width), linear=linear),
        SelfModulatedLayerNorm(width, config.style_dim, linear=config.modulation),
        SelfModulatedLayerNorm(width, config.style_dim, linear=config.modulation),
    )


def _patch_size(config: ViTGANGeneratorConfig, start: tuple[int, int], size: tuple[int, int]) -> int:
    rows, columns = size[0] // start[0], size[1] // start[1]
    if (start[0] * rows, start[1] * columns) != size or rows != columns:
        raise ConfigError(
            f"vitgan: a map of {start[0]}x{start[1]} does not divide pictures of "
            f"{size[0]}x{size[1]} into square patches; choose sizes with one ratio"
        )
    if (reason := config._unsuited_patch(rows)) is not None:
        raise ConfigError(f"vitgan: a patch of {reason}")
    return rows
