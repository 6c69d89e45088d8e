"""Large pictures encoded and painted in tiles, with the result of doing it at once.

What makes tiles disagree is not the convolutions, which see one position to each side, but what sees the
whole picture: attention, and the statistics of GroupNorm, which nothing short of the whole picture gives
(guessed from samples they were wrong by tenths of a deviation). So the order of work is turned round: each
layer runs over all tiles before the next one begins. Tiles are bands of rows that overlap by what a
convolution sees. A layer's output is a `FeatureMap`, which waits in a file where it is large and has summed
up its own mean and variance by the time that the next layer asks for them. Attention reads keys and values
band by band with a running softmax (Milakov and Gimelshein 2018). Results differ from undivided work by
rounding alone, so that there are no borders to be seen; memory is that of a few bands, whatever the
picture's size.

Axes: B pictures, C channels, h w cells, H W pixels, r rows of a band, n m positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage1_vq.decoder import Decoder
from stage1_vq.encoder import Level, Middle
from stage1_vq.model import CHANNELS_LAST_FROM, VQModel
from stage1_vq.scratch import FeatureMap, Moments, Scratch
from taming.errors import UserError
from taming.layers.norm import affine_of
from taming.layers.resnet import Downsample, ResidualBlock, Upsample
from taming.layers.spatial_attention import SpatialAttention

TILE_PIXELS = 256
"""A band holds as many values as a square of this side does in the layers at full size."""
TILED_ABOVE = 512 * 512
"""Pictures of more pixels are worked on in tiles unless the caller says otherwise."""


def decode(tokenizer: VQModel, codes: Tensor, *, tile: int | None = None) -> Tensor:
    """`tokenizer.decode`, in tiles where a picture has more than TILED_ABOVE pixels.

    Codes (B, h, w) -> (B, C, h f, w f). `tile` None: as said; 0: never; else always, of that side.
    Decoders of other kinds than cnn paint pictures as a whole; to ask for tiles raises UserError.
    """
    factor = tokenizer.config.downsample_factor
    if tile is None and not isinstance(tokenizer.decoder, Decoder):
        return tokenizer.decode(codes)
    if not in_tiles(codes.shape[-2] * factor, codes.shape[-1] * factor, tile):
        return tokenizer.decode(codes)
    return decode_tiled(tokenizer, codes, tile=tile or TILE_PIXELS)


def encode(tokenizer: VQModel, images: Tensor, *, tile: int | None = None) -> Tensor:
    """`tokenizer.encode`, in tiles where pictures exceed TILED_ABOVE pixels; `tile` as in `decode`."""
    if not in_tiles(images.shape[-2], images.shape[-1], tile):
        return tokenizer.encode(images)
    return encode_tiled(tokenizer, images, tile=tile or TILE_PIXELS)


def in_tiles(height: int, width: int, tile: int | None) -> bool:
    """Whether a picture is worked on in tiles. Raises UserError for a negative size of them."""
    if tile is not None and tile < 0:
        raise UserError(f"tile {tile} is negative; give a side in pixels, or 0 for no tiles")
    return tile != 0 and (tile is not None or height * width > TILED_ABOVE)


@torch.no_grad()
def decode_tiled(
    tokenizer: VQModel, codes: Tensor, *, tile: int = TILE_PIXELS, out: Tensor | None = None
) -> Tensor:
    """Codes (B, h, w) -> (B, C, h f, w f), not clamped, as `tokenizer.decode` up to rounding.

    Memory is that of some bands of `tile` x `tile` pixels and the output, which is written to `out` where
    that is given (any device and type). Maps that are larger lie in the folder for temporary files, 1 to
    2 KiB a pixel for 128 channels; with an accelerator, in host memory. Raises UserError for codes that
    `decode` refuses, for decoders of other kinds than cnn, and where the disk is too full.
    """
    decoder = tokenizer.decoder
    if not isinstance(decoder, Decoder):
        raise UserError(
            f"a decoder of kind {tokenizer.config.decoder.kind} paints pictures as a whole, not in tiles; "
            "leave the size of tiles out, or give 0"
        )
    tokenizer.check_indices(codes)
    config = tokenizer.config
    factor, patch = config.downsample_factor, config.patch_size
    shape = (len(codes), config.in_channels, codes.shape[1] * factor, codes.shape[2] * factor)
    out = torch.empty(shape, device=codes.device) if out is None else out
    if tuple(out.shape) != shape:
        raise UserError(f"out has shape {tuple(out.shape)}; these codes decode to {shape}")
    for row, picture in zip(codes, out, strict=True):
        with _scratch(tokenizer, tile).until_done() as scratch:
            bands = _Bands(scratch)
            x = scratch.new_map(config.z_channels, *row.shape)
            for top, bottom in bands.of(x.height, x.channels * x.width):
                x.write(top, tokenizer.decoder_input(row[None, top:bottom]))
            x = bands.middle(bands.convolved(x, decoder.conv_in), decoder.mid)
            for level in reversed(decoder.up):
                assert isinstance(level, Level)
                x = bands.level(x, level)

            def paint(top: int, band: Tensor, picture: Tensor = picture) -> None:
                pixels = (F.pixel_shuffle(band, patch) if patch > 1 else band)[0]
                picture[:, top * patch : top * patch + pixels.shape[1]] = pixels

            bands.convolve(x, decoder.conv_out, paint, norm=decoder.norm_out)
    return out


@torch.no_grad()
def encode_tiled(tokenizer: VQModel, images: Tensor, *, tile: int = TILE_PIXELS) -> Tensor:
    """Pictures (B, C, H, W) in [-1, 1], or one-hot maps -> codes (B, h, w), as `tokenizer.encode`.

    A cell whose two nearest codes lie within rounding of each other may get the other one. Memory as for
    `decode_tiled`. Raises UserError for shapes that do not fit.
    """
    tokenizer.check_images(images)
    config, encoder = tokenizer.config, tokenizer.encoder
    factor, patch = config.downsample_factor, config.patch_size
    codes = torch.empty(
        len(images), images.shape[2] // factor, images.shape[3] // factor, dtype=torch.int64,
        device=images.device,
    )  # fmt: skip
    for picture, row in zip(images, codes, strict=True):
        with _scratch(tokenizer, tile).until_done() as scratch:
            bands = _Bands(scratch)
            channels, height, width = config.in_channels * patch**2, *(s // patch for s in picture.shape[1:])
            x = scratch.new_map(channels, height, width)
            for top, bottom in bands.of(height, channels * width):
                pixels = picture[None, :, top * patch : bottom * patch].to(scratch.device)
                x.write(top, F.pixel_unshuffle(pixels, patch) if patch > 1 else pixels)
            x = bands.convolved(x, encoder.conv_in)
            for level in encoder.down:
                assert isinstance(level, Level)
                x = bands.level(x, level)
            x = bands.middle(x, encoder.mid)

            def choose(top: int, band: Tensor, row: Tensor = row) -> None:
                chosen = tokenizer.quantize.encode(tokenizer.quant_conv(band))
                row[top : top + band.shape[2]] = chosen[0]

            bands.convolve(x, encoder.conv_out, choose, norm=encoder.norm_out)
    return codes


def _scratch(tokenizer: VQModel, tile: int) -> Scratch:
    config, weight = tokenizer.config, tokenizer.encoder.conv_in.weight
    return Scratch(
        budget=tile**2 * config.channels,
        dtype=weight.dtype,
        device=weight.device,
        channels_last=config.channels >= CHANNELS_LAST_FROM,
        groups=config.norm_num_groups,
    )


class _Bands:
    """Layers of the autoencoder over feature maps. A map that is given is used up."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch

    def of(self, height: int, values_of_row: int, multiple: int = 1) -> list[tuple[int, int]]:
        """(top, bottom) of bands within the budget, each a `multiple` of rows high but for the last."""
        rows = max(self.scratch.budget // values_of_row // multiple, 1) * multiple
        return [(top, min(top + rows, height)) for top in range(0, height, rows)]

    def level(self, x: FeatureMap, level: Level) -> FeatureMap:
        """Blocks, attention and the change of size of one level."""
        for index, block in enumerate(level.block):
            assert isinstance(block, ResidualBlock)
            x = self.block(x, block)
            if len(level.attn):
                attention = level.attn[index]
                assert isinstance(attention, SpatialAttention)
                x = self.attention(x, attention)
        if isinstance(level.upsample, Upsample):
            return self.upsampled(x, level.upsample.conv)
        if isinstance(level.downsample, Downsample):
            return self.downsampled(x, level.downsample.conv)
        return x

    def middle(self, x: FeatureMap, middle: Middle) -> FeatureMap:
        x = self.block(x, middle.block_1)
        if middle.attn_1 is not None:
            x = self.attention(x, middle.attn_1)
        return self.block(x, middle.block_2)

    def block(self, x: FeatureMap, block: ResidualBlock) -> FeatureMap:
        h = self.scratch.new_map(block.conv1.out_channels, x.height, x.width)
        self.convolve(x, block.conv1, h.write, norm=block.norm1)
        shortcut = block.nin_shortcut
        # A position of x is needed at that position alone, so that the sum can take its place.
        target = x if shortcut is None else self.scratch.new_map(h.channels, x.height, x.width)
        target.restart_moments()

        def add(top: int, band: Tensor) -> None:
            given = x.read(top, top + band.shape[2])
            target.write(top, band + (given if shortcut is None else shortcut(given)))

        self.convolve(h, block.conv2, add, norm=block.norm2)
        h.close()
        if target is not x:
            x.close()
        return target

    def convolved(self, x: FeatureMap, conv: nn.Conv2d) -> FeatureMap:
        target = self.scratch.new_map(conv.out_channels, x.height, x.width)
        self.convolve(x, conv, target.write)
        x.close()
        return target

    def convolve(
        self,
        x: FeatureMap,
        conv: nn.Conv2d,
        take: Callable[[int, Tensor], None],
        *,
        norm: nn.GroupNorm | None = None,
    ) -> None:
        """conv(silu(norm(x))), or conv(x): a 3x3 convolution, whose bands go to take(top, band)."""
        for top, bottom in self.of(x.height, max(conv.in_channels, conv.out_channels) * x.width):
            above, below = max(top - 1, 0), min(bottom + 1, x.height)
            band = x.read(above, below)
            if norm is not None:
                band = F.silu(normalised(band, norm, x.moments), inplace=True)
            # The convolution's own padding is right where the picture ends; elsewhere its row is cut away.
            take(top, conv(band)[:, :, top - above : bottom - above])

    def upsampled(self, x: FeatureMap, conv: nn.Conv2d) -> FeatureMap:
        """Nearest x2, then the convolution."""
        target = self.scratch.new_map(conv.out_channels, 2 * x.height, 2 * x.width)
        for top, bottom in self.of(x.height, 4 * x.channels * x.width):
            above, below = max(top - 1, 0), min(bottom + 1, x.height)
            band = conv(F.interpolate(x.read(above, below), scale_factor=2.0, mode="nearest"))
            target.write(2 * top, band[:, :, 2 * (top - above) : 2 * (bottom - above)])
        x.close()
        return target

    def downsampled(self, x: FeatureMap, conv: nn.Conv2d) -> FeatureMap:
        """One row below and one column right of zeros, then the convolution of stride 2."""
        target = self.scratch.new_map(conv.out_channels, x.height // 2, x.width // 2)
        for top, bottom in self.of(x.height, x.channels * x.width, multiple=2):
            below = min(bottom + 1, x.height)
            band = F.pad(x.read(top, below), (0, 1, 0, bottom + 1 - below))
            target.write(top // 2, conv(band))
        x.close()
        return target

    def attention(self, x: FeatureMap, layer: SpatialAttention) -> FeatureMap:
        """x + proj_out(softmax(q k^T / sqrt(C)) v) over all positions of the map."""
        keys, values = (self.scratch.new_map(x.channels, x.height, x.width) for _ in range(2))
        bands = self.of(x.height, x.channels * x.width)
        for top, bottom in bands:
            band = normalised(x.read(top, bottom), layer.norm, x.moments)
            keys.write(top, layer.k(band))
            values.write(top, layer.v(band))
        moments = x.moments
        x.restart_moments()
        for top, bottom in bands:
            band = x.read(top, bottom)
            query = layer.q(normalised(band, layer.norm, moments))
            attended = self._attended(rearrange(query, "1 c r w -> (r w) c"), keys, values, bands)
            attended = rearrange(attended, "(r w) c -> 1 c r w", w=x.width)
            x.write(top, band + layer.proj_out(attended))
        keys.close()
        values.close()
        return x

    def _attended(
        self, query: Tensor, keys: FeatureMap, values: FeatureMap, bands: list[tuple[int, int]]
    ) -> Tensor:
        """softmax(query keys^T / sqrt(C)) values, query (n, C) -> (n, C), with keys and values in bands.

        Softmax is summed up under a running maximum.
        """
        query = query * query.shape[-1] ** -0.5
        maximum = query.new_full((len(query), 1), float("-inf"))
        total, result = torch.zeros_like(maximum), torch.zeros_like(query)
        for top, bottom in bands:
            key = rearrange(keys.read(top, bottom), "1 c r w -> c (r w)")
            value = rearrange(values.read(top, bottom), "1 c r w -> (r w) c")
            # So few queries at a time that their scores are no larger than a band.
            for part in torch.arange(len(query)).split(max(self.scratch.budget // len(value), 1)):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                scores = query[rows] @ key
                highest = torch.maximum(maximum[rows], scores.amax(-1, keepdim=True))
                weights = scores.sub_(highest).exp_()
                rescale = (maximum[rows] - highest).exp()
                total[rows] = total[rows] * rescale + weights.sum(-1, keepdim=True)
                result[rows] = torch.addmm(result[rows] * rescale, weights, value)
                maximum[rows] = highest
        return result / total


def normalised(band: Tensor, norm: nn.GroupNorm, moments: Moments) -> Tensor:
    """norm(band) with the statistics of the whole map that the band (1, C, r, W) is of."""
    mean, rstd = moments.statistics(norm.eps)
    return affine_of(band, norm.weight, norm.bias, mean, rstd)
