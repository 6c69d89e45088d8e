"""Latents to pictures by the trunk of a GAN system's generator.

Axes: B pictures, h w cells, H W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from stage1_vq.config import CNNDecoderConfig, VQModelConfig
from taming.errors import UserError
from taming.gan.generator import Painted, Painter
from taming.gan.generators import build_trunk
from taming.layers.spectral_norm import SpectralConv2d


class TrunkDecoder(Painter):
    """(B, z_channels, h, w) -> pictures (B, in_channels, h f, w f), about [-1, 1].

    A 1x1 projection to the width at which latents enter the trunk; of SAGAN, all of whose layers are, it is
    spectrally normalised. There is no class, and no style but what the trunk makes of the latents. Raises
    ConfigError where the trunk cannot paint pictures of the config's resolution from its grid.
    """

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        assert not isinstance(config.decoder, CNNDecoderConfig)
        cells = config.resolution // config.downsample_factor
        self.trunk = build_trunk(
            config.decoder,
            start=(cells, cells),
            size=(config.resolution, config.resolution),
            channels=config.in_channels,
        )
        conv = SpectralConv2d if config.decoder.kind == "sagan" else nn.Conv2d
        self.project = conv(config.z_channels, self.trunk.in_channels, 1)

    def forward(self, z: Tensor) -> Painted:
        painted: Painted = self.trunk(self.project(z))
        return painted

    def paint(self, *features: Tensor) -> Tensor:
        """The trunk's last layer and what follows it."""
        return self.trunk.paint(*features)

    @property
    def last_layer(self) -> nn.Parameter:
        """The raw weight of the trunk's last layer."""
        return self.trunk.last_layer

    def last_gradient(self, features: tuple[Tensor, ...], gradient: Tensor) -> Tensor:
        """Gradient of `last_layer`, as Painter says."""
        return self.trunk.last_gradient(features, gradient)

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where the trunk cannot paint pictures of this size."""
        self.trunk.check_size(height, width)

    @property
    def only_size(self) -> tuple[int, int] | None:
        """(H, W) where it paints pictures of that size alone."""
        height, width = self.trunk.size
        try:
            self.trunk.check_size(2 * height, 2 * width)
        except UserError:
            return height, width
        return None

    def before_step(self, progress: float) -> None:
        """Set what follows a schedule in the trunk."""
        self.trunk.before_step(progress)
