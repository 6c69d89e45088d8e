"""Latents to pictures: the published convolutional decoder, under the published names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from stage1_vq.config import VQModelConfig
from stage1_vq.encoder import Level, Middle, residual_block
from stage1_vq.loss import last_conv_gradient
from taming.gan.generator import Painted, Painter
from taming.layers.norm import group_norm, group_norm_silu
from taming.layers.resnet import Upsample
from taming.layers.spatial_attention import SpatialAttention


class Decoder(Painter):
    """(B, z_channels, h, w) -> pictures (B, in_channels, h f, w f); not clamped."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.recompute, self.patch_size = config.recompute, config.patch_size
        num_levels = len(config.channel_multipliers)
        width = config.channels * config.channel_multipliers[-1]
        size = config.resolution // config.downsample_factor
        self.conv_in = nn.Conv2d(config.z_channels, width, 3, padding=1)
        self.mid = Middle(config, width)
        levels: list[Level] = []
        for index in reversed(range(num_levels)):
            block, attn = [], []
            for _ in range(config.num_res_blocks + 1):
                block.append(
                    residual_block(config, width, config.channels * config.channel_multipliers[index])
                )
                width = config.channels * config.channel_multipliers[index]
                if size in config.attention_resolutions:
                    attn.append(SpatialAttention(width, config.norm_num_groups))
            up = Upsample(width, recompute=config.recompute) if index else None
            # Index 0 is the highest resolution, which is the last to run.
            levels.insert(0, Level(block, attn, upsample=up))
            size *= 2
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(width, config.norm_num_groups)
        self.conv_out = nn.Conv2d(width, config.in_channels * config.patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Painted:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        features = group_norm_silu(h, self.norm_out, recompute=self.recompute)
        return Painted(self.paint(features), (features.detach(),))

    def paint(self, *features: Tensor) -> Tensor:
        """(B, C, H/p, W/p) of patch size p, before the last convolution -> pictures."""
        images: Tensor = self.conv_out(*features)
        if self.patch_size > 1:
            images = F.pixel_shuffle(images, self.patch_size)
        return images

    only_size: None = None
    """It paints pictures of any size."""

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution."""
        weight = self.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def last_gradient(self, features: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """Gradient of `last_layer`, as Painter says, without another forward of the convolution."""
        return last_conv_gradient(features[0], self.conv_out, gradient)
