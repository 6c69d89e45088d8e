"""The tokenizer: encoder, quantizer and decoder as one model that can be saved and loaded."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stage1_vq.config import CNNDecoderConfig, VQModelConfig
from stage1_vq.decoder import Decoder
from stage1_vq.encoder import Encoder
from stage1_vq.inputs import one_hot
from stage1_vq.quantizers import build_quantizer
from stage1_vq.trunk_decoder import TrunkDecoder
from taming.artifact import content_hash, load_artifact, push_artifact, save_artifact
from taming.building import build_with
from taming.config import build_config
from taming.errors import UserError
from taming.types import QuantizerOutput, TokenizerSpec

ARTIFACT_KIND = "vq_model"
ENCODING_PARTS = ("encoder", "quant_conv", "quantize")
"""What decides the codes; the rest only paints them."""
CHANNELS_LAST_FROM = 64
"""Base width from which convolutions run faster with the channels last (specs of the layers' speed)."""


@dataclass(frozen=True)
class VQOutput:
    """What one forward of the autoencoder gives."""

    reconstruction: Tensor
    """(B, C, H, W), not clamped; of segmentation logits."""
    quantizer: QuantizerOutput
    features: tuple[Tensor, ...]
    """Detached: what the decoder's last layer saw."""


class VQModel(nn.Module):
    """Pictures (B, C, H, W) in [-1, 1] to codes (B, H/f, W/f) and back (Esser et al. 2021)."""

    def __init__(self, config: VQModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = build_decoder(config)
        self.quantize = build_quantizer(config.quantizer)
        self.quant_conv = nn.Conv2d(config.z_channels, self.quantize.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantize.code_dim, config.z_channels, 1)
        if config.input == "segmentation" and config.in_channels > 1:
            # A label starts out at one pixel in L, not in two: else the first hundreds of steps learn this.
            assert isinstance(self.decoder, Decoder)
            assert self.decoder.conv_out.bias is not None
            nn.init.constant_(self.decoder.conv_out.bias, -math.log(config.in_channels - 1))
        if config.channels >= CHANNELS_LAST_FROM:
            self.to(memory_format=torch.channels_last)

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(
            codebook_size=self.quantize.codebook_size,
            code_dim=self.quantize.code_dim,
            downsample_factor=self.config.downsample_factor,
            in_channels=self.config.in_channels,
            pixel_range=(0.0, 1.0) if self.config.input == "segmentation" else (-1.0, 1.0),
        )

    @property
    def codebook(self) -> Tensor:
        """(K, D) fp32, detached: row i is what code i decodes from."""
        return self.quantize.codebook.detach()

    @property
    def last_layer(self) -> nn.Parameter:
        """The decoder's last weight, at which the adaptive weight compares gradients."""
        return self.decoder.last_layer

    def forward(self, images: Tensor) -> VQOutput:
        """Reconstruct (B, C, H, W) in [-1, 1], H and W multiples of the downsample factor.

        With autocast the convolutions run in half precision; the quantizer never does.
        """
        quantizer = self.quantize(self.latents(images))
        painted = self.decoder(self._layout(self.post_quant_conv(quantizer.quantized)))
        return VQOutput(painted.images, quantizer, painted.features)

    def latents(self, images: Tensor) -> Tensor:
        """(B, D, h, w): what the quantizer is given."""
        z: Tensor = self.quant_conv(self.encoder(self._layout(images)))
        return z

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> codes (B, h, w) int64. Raises UserError for shapes that do not fit.

        A tokenizer of segmentation takes labels (B, H, W) int64, or one-hot maps (B, L, H, W) float.
        """
        if self.config.input == "segmentation" and images.ndim == 3 and images.dtype == torch.int64:
            images = one_hot(images, self.config.in_channels)
        self.check_images(images)
        indices: Tensor = self.quantize.encode(self.latents(images))
        return indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) in [0, K) -> pictures (B, C, h f, w f) float, about [-1, 1], not clamped.

        A tokenizer of segmentation gives logits (B, L, h f, w f): their argmax over L is the map.
        """
        self.check_indices(indices)
        images: Tensor = self.decoder(self.decoder_input(indices)).images
        return images.float()

    def decoder_input(self, indices: Tensor) -> Tensor:
        """Codes (B, h, w) that were checked -> (B, z_channels, h, w)."""
        return self._layout(self.post_quant_conv(self.quantize.lookup(indices)))

    def content_hash(self) -> str:
        """sha256 of all weights: the same on every machine, another after any change."""
        return content_hash(self.state_dict())

    def codes_hash(self) -> str:
        """sha256 of the weights that decide the codes: the same for another decoder of the same codes."""
        state = self.state_dict()
        return content_hash({key: state[key] for key in state if key.split(".")[0] in ENCODING_PARTS})

    def makes_codes_of(self, recorded: str) -> bool:
        """Whether codes or a transformer that name the hash `recorded` belong to this tokenizer."""
        return recorded in (self.codes_hash(), self.content_hash())

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str = "") -> VQModel:
        """Load a saved folder, the model of a run, or a hub id "owner/name"; in eval mode, on the CPU.

        Raises ArtifactError where there is none, or it is not a tokenizer of this toolkit.
        """
        values, state = load_artifact(source, ARTIFACT_KIND, subfolder=subfolder)
        config = build_config(VQModelConfig, values, source=f"config of {source}")
        return build_with(lambda: cls(config), state, source=source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        spec = self.spec
        facts: dict[str, Any] = {
            "codebook_size": spec.codebook_size,
            "code_dim": spec.code_dim,
            "downsample_factor": spec.downsample_factor,
            "input": self.config.input,
            "in_channels": spec.in_channels,
            "pixel_range": list(spec.pixel_range),
        }
        save_artifact(folder, ARTIFACT_KIND, self.config, self.state_dict(), facts=facts)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the hub as "owner/name"; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_artifact(folder, repo_id, private=private)

    def _layout(self, x: Tensor) -> Tensor:
        if self.config.channels >= CHANNELS_LAST_FROM:
            return x.contiguous(memory_format=torch.channels_last)
        # A quantizer's output lies channels last, which takes a narrow decoder twice the time.
        return x.contiguous()

    def check_images(self, images: Tensor) -> None:
        channels = self.config.in_channels
        if images.ndim != 4 or images.shape[1] != channels:
            labels = ", or labels (B, H, W) int64" if self.config.input == "segmentation" else ""
            raise UserError(
                f"pictures have shape {tuple(images.shape)}; this tokenizer of {self.config.input} takes "
                f"(B, {channels}, H, W){labels}"
            )
        if not images.is_floating_point():
            raise UserError(f"pictures are {images.dtype}; give float in [-1, 1], which is uint8 / 127.5 - 1")
        self.check_size(images.shape[2], images.shape[3])

    def check_size(self, height: int, width: int) -> None:
        """Raises UserError where pictures of this size do not divide into cells."""
        factor = self.config.downsample_factor
        for name, size in (("height", height), ("width", width)):
            if size % factor or size == 0:
                below, above = size // factor * factor, -(-max(size, 1) // factor) * factor
                crop = f"crop to {below} or " if below else ""
                raise UserError(
                    f"image {name} {size} is not divisible by the downsample factor {factor}; "
                    f"{crop}pad to {above}"
                )

    def check_painted_size(self, height: int, width: int) -> None:
        """Raises UserError where `decode` cannot paint pictures of this size; `encode` may take them."""
        self.check_size(height, width)
        self.decoder.check_size(height, width)

    def check_indices(self, indices: Tensor) -> None:
        """Raises UserError for codes that `decode` cannot paint."""
        if indices.ndim != 3 or indices.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"codes are {indices.dtype} of shape {tuple(indices.shape)}; decode takes int64 (B, h, w)"
            )
        if indices.numel() == 0:
            raise UserError(
                f"codes of shape {tuple(indices.shape)} are empty; decode takes at least one cell"
            )
        low, high = (int(value) for value in indices.aminmax())
        largest = self.quantize.codebook_size - 1
        if low < 0 or high > largest:
            raise UserError(f"codes lie in [{low}, {high}]; this codebook has codes 0 to {largest}")
        factor = self.config.downsample_factor
        self.decoder.check_size(indices.shape[1] * factor, indices.shape[2] * factor)


def build_decoder(config: VQModelConfig) -> Decoder | TrunkDecoder:
    """A fresh decoder. Raises ConfigError where its kind does not suit the model's other settings."""
    return Decoder(config) if isinstance(config.decoder, CNNDecoderConfig) else TrunkDecoder(config)
