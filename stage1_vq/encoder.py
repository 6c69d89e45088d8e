"""Pictures to latents: the published convolutional encoder, under the published names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.config import VQModelConfig
from taming.layers.conv import norm_silu_conv
from taming.layers.norm import group_norm
from taming.layers.resnet import Downsample, ResidualBlock
from taming.layers.spatial_attention import SpatialAttention


class Level(nn.Module):
    """Residual blocks, each followed by attention where the level has it, then a change of size."""

    def __init__(
        self,
        block: list[ResidualBlock],
        attn: list[SpatialAttention],
        *,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(block), nn.ModuleList(attn)
        self.downsample, self.upsample = downsample, upsample

    def forward(self, h: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[index](h)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                h = resample(h)
        return h


class Middle(nn.Module):
    """Residual block, attention (optional), residual block at the lowest resolution."""

    def __init__(self, config: VQModelConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = residual_block(config, channels, channels)
        self.attn_1 = SpatialAttention(channels, config.norm_num_groups) if config.mid_attention else None
        self.block_2 = residual_block(config, channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        h = self.block_1(h)
        if self.attn_1 is not None:
            h = self.attn_1(h)
        result: Tensor = self.block_2(h)
        return result


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, z_channels, H/f, W/f)."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.patch_size = config.patch_size
        self.conv_in = nn.Conv2d(config.in_channels * config.patch_size**2, config.channels, 3, padding=1)
        width, size = config.channels, config.resolution // config.patch_size
        levels = []
        for index, multiplier in enumerate(config.channel_multipliers):
            block, attn = [], []
            for _ in range(config.num_res_blocks):
                block.append(residual_block(config, width, config.channels * multiplier))
                width = config.channels * multiplier
                if size in config.attention_resolutions:
                    attn.append(SpatialAttention(width, config.norm_num_groups))
            last = index == len(config.channel_multipliers) - 1
            down = None if last else Downsample(width, recompute=config.recompute)
            levels.append(Level(block, attn, downsample=down))
            size //= 2
        self.down = nn.ModuleList(levels)
        self.mid = Middle(config, width)
        self.norm_out = group_norm(width, config.norm_num_groups)
        self.conv_out = nn.Conv2d(width, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        if self.patch_size > 1:
            images = F.pixel_unshuffle(images, self.patch_size)
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return norm_silu_conv(self.mid(h), self.norm_out, self.conv_out, recompute=self.recompute)


def residual_block(config: VQModelConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    """A block with the dropout, groups and memory rule of the config."""
    return ResidualBlock(
        in_channels,
        out_channels,
        dropout=config.dropout,
        norm_num_groups=config.norm_num_groups,
        recompute=config.recompute,
    )
