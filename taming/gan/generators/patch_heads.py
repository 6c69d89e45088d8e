"""Tokens to pixels: what stands at the end of a painter that thinks in patches.

Axes: B pictures, N tokens (a grid h w of cells), D width, S style, P patch size, E width of the head,
C channels, H = h P and W = w P pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.layers.coordinates import CoordinateEncoding
from taming.layers.modulated import ModulatedConv2d, ModulatedLinear
from taming.layers.token_norm import PixelNorm


class PatchHead(nn.Module, ABC):
    """Tokens (B, N, D) and styles (B, S) -> pictures (B, C, H, W), in two steps."""

    @abstractmethod
    def draw(self, tokens: Tensor, style: Tensor) -> tuple[Tensor, ...]:
        """All but the last layer: the arguments of `paint`, with their graph."""

    @abstractmethod
    def paint(self, *features: Tensor) -> Tensor:
        """The last layer: pictures (B, C, H, W)."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The raw weight of the last layer."""


class ImplicitPatchHead(PatchHead):
    """Each token is a function of the place within its patch (ViTGAN, Lee et al. 2021, arXiv:2107.04589).

    Two dense layers over the P^2 encoded pixel coordinates; the token modulates their weights, which all
    patches share. The picture's style is not looked at: the tokens have taken it in.
    """

    def __init__(
        self,
        token_dim: int,
        channels: int,
        grid: tuple[int, int],
        patch_size: int,
        *,
        width: int,
        demodulate: bool = True,
    ) -> None:
        """`demodulate`: bring the first layer's modulated weights to length one."""
        super().__init__()
        self.grid, self.patch_size = grid, patch_size
        self.places = CoordinateEncoding(width)
        self.hidden = ModulatedLinear(width, width, token_dim, demodulate=demodulate)
        self.pixels = ModulatedLinear(width, channels, token_dim, demodulate=False)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.pixels.weight

    def draw(self, tokens: Tensor, style: Tensor) -> tuple[Tensor, ...]:
        """(B, N, P^2, E), and the tokens (B, N, D)."""
        return self.draw_at(tokens, self.patch_size)

    def draw_at(self, tokens: Tensor, patch_size: int) -> tuple[Tensor, ...]:
        """The same at `patch_size` points a side: the function is defined between the pixels, too."""
        places = self.places(patch_size, patch_size)  # (P^2, E)
        return _leaky(self.hidden(places, tokens)), tokens

    def paint(self, *features: Tensor) -> Tensor:
        hidden, tokens = features
        pixels = self.pixels(hidden, tokens)  # (B, N, P^2, C)
        return rearrange(
            pixels,
            "b (h w) (row column) c -> b c (h row) (w column)",
            h=self.grid[0],
            w=self.grid[1],
            row=math.isqrt(pixels.shape[2]),
        )


class ConvolutionalPatchHead(PatchHead):
    """The tokens as a map, then StyleGAN2's synthesis (Karras et al. 2020, arXiv:1912.04958) up to pixels.

    At each size two modulated 3x3 convolutions and one to pixels, whose pictures add up; P is a power of two,
    log2(P) doublings. The doubling is bilinear, which is what zeros between the pixels and the published
    filter [1, 3, 3, 1] come to. The published noise is left out: a picture is a function of its style. Tokens
    enter with mean square one, and the pictures of L sizes add up over the root of L, so that what is painted
    at the start is about as bright as pictures are, whatever P is.
    """

    def __init__(
        self,
        token_dim: int,
        style_dim: int,
        channels: int,
        grid: tuple[int, int],
        patch_size: int,
        *,
        width: int,
    ) -> None:
        """`width` channels at the picture's size, twice as many a halving, at most `token_dim`."""
        super().__init__()
        self.grid = grid
        self.norm = PixelNorm()
        doublings = patch_size.bit_length() - 1
        assert patch_size == 2**doublings
        widths = [min(token_dim, width * 2 ** (doublings - index)) for index in range(doublings + 1)]
        self.share = len(widths) ** -0.5
        self.levels = nn.ModuleList(
            _Level(
                token_dim if index == 0 else widths[index - 1], wide, style_dim, channels, doubles=index > 0
            )
            for index, wide in enumerate(widths)
        )

    @property
    def last_layer(self) -> nn.Parameter:
        return self._last.to_pixels.weight

    @property
    def _last(self) -> _Level:
        level = self.levels[-1]
        assert isinstance(level, _Level)
        return level

    def draw(self, tokens: Tensor, style: Tensor) -> tuple[Tensor, ...]:
        """(B, E, H, W), styles (B, S), and the sum of the coarser pictures (B, C, H, W)."""
        h, w = self.grid
        x = rearrange(self.norm(tokens), "b (h w) d -> b d h w", h=h, w=w)
        pixels: Tensor | None = None
        for level in self.levels:
            assert isinstance(level, _Level)
            if level.doubles:
                x = _double(x)
                pixels = _double(pixels) if pixels is not None else None
            x = level(x, style)
            if level is self._last:
                break
            here = level.to_pixels(x, style) * self.share
            pixels = here if pixels is None else pixels + here
        return (x, style) if pixels is None else (x, style, pixels)

    def paint(self, *features: Tensor) -> Tensor:
        x, style, *coarser = features
        pixels: Tensor = self._last.to_pixels(x, style) * self.share
        return pixels + coarser[0] if coarser else pixels


class _Level(nn.Module):
    """The convolutions at one size: (B, C, h, w) and styles (B, S) -> (B, C', h, w)."""

    def __init__(self, narrow: int, wide: int, style_dim: int, channels: int, *, doubles: bool) -> None:
        super().__init__()
        self.doubles = doubles
        self.first = ModulatedConv2d(narrow, wide, 3, style_dim)
        self.second = ModulatedConv2d(wide, wide, 3, style_dim)
        self.to_pixels = ModulatedConv2d(wide, channels, 1, style_dim, demodulate=False)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return _leaky(self.second(_leaky(self.first(x, style)), style))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _leaky(x: Tensor) -> Tensor:
    # The gain keeps the deviation at one.
    return F.leaky_relu(x, 0.2) * math.sqrt(2)
