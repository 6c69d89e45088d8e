"""What a user can say about a codebook and its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stage1_vq.adversarial_config import AdversarialConfig
from stage1_vq.codebook_alarm import CodebookAlarmConfig
from stage1_vq.quantizers import NearestConfig, QuantizerConfig
from taming.config import Config
from taming.data.config import DataConfig
from taming.gan.generators import (
    GeneratorConfig,
    SAGANGeneratorConfig,
    STransGANGeneratorConfig,
    TransGANGeneratorConfig,
    ViTGANGeneratorConfig,
)
from taming.training.config import OptimizerConfig, TrainingConfig

Positive = Annotated[int, Field(ge=1)]
InputKind = Literal["image", "segmentation", "depth", "edges", "condition_image"]


class CNNDecoderConfig(Config):
    """The published decoder, which mirrors the encoder: the model's own keys say how."""

    kind: Literal["cnn"] = "cnn"


DecoderConfig = Annotated[
    CNNDecoderConfig
    | SAGANGeneratorConfig
    | TransGANGeneratorConfig
    | ViTGANGeneratorConfig
    | STransGANGeneratorConfig,
    Field(discriminator="kind"),
]


class VQModelConfig(Config):
    """The published autoencoder (Esser et al. 2021, arXiv:2012.09841); config.json holds it."""

    input: InputKind = "image"
    """What is tokenized (see stage1_vq.inputs): a key of the batch, or the edges of its picture."""
    in_channels: Positive = 3
    """Of segmentation the number of labels; of depth and edges 1."""
    resolution: Positive = 256
    """The size that `attention_resolutions` refers to; pictures of any other size pass as well, but for
    decoders that are built for one size, which is this."""
    patch_size: Positive = 1
    """Squares of so many pixels enter as one position (space to depth) and leave as one: with 2 the costly
    full-size layers fall away (docs/log.md has what that gives). 1 is as published."""
    channels: Positive = 128
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 1, 2, 2, 4)
    """One a level; each level but the last halves the size."""
    num_res_blocks: Positive = 2
    """A level in the encoder; the decoder has one more."""
    attention_resolutions: tuple[Positive, ...] = (16,)
    mid_attention: bool = True
    z_channels: Positive = 256
    dropout: float = Field(default=0.0, ge=0, lt=1)
    norm_num_groups: Positive = 32
    recompute: bool = True
    """Keep about half of the tensors for the backward pass and compute the others again."""
    quantizer: QuantizerConfig = NearestConfig()
    decoder: DecoderConfig = CNNDecoderConfig()
    """cnn is as published; others are the trunks of GAN systems, without classes. Codes depend on the encoder
    and the quantizer alone, so that decoders of several kinds can paint the same codes."""

    @property
    def downsample_factor(self) -> int:
        return int(self.patch_size * 2 ** (len(self.channel_multipliers) - 1))

    @model_validator(mode="after")
    def _fits(self) -> VQModelConfig:
        if self.input in ("depth", "edges") and self.in_channels != 1:
            raise ValueError(
                f"input {self.input} has one channel, not {self.in_channels}; set in_channels: 1"
            )
        for multiplier in self.channel_multipliers:
            if (self.channels * multiplier) % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} does not divide channels {self.channels} * "
                    f"{multiplier}; use channels that are a multiple of it, or fewer groups"
                )
        largest = self.resolution // self.patch_size
        levels = [largest // 2**level for level in range(len(self.channel_multipliers))]
        stray = [size for size in self.attention_resolutions if size not in levels]
        if stray:
            raise ValueError(
                f"attention_resolutions {stray[0]} is not the size of a level; with resolution "
                f"{self.resolution} the levels have {', '.join(map(str, levels))}"
            )
        if not isinstance(self.decoder, CNNDecoderConfig):
            self._check_trunk(self.decoder)
        return self

    def _check_trunk(self, decoder: GeneratorConfig) -> None:
        if self.input == "segmentation":
            raise ValueError(
                f"a decoder of kind {decoder.kind} paints pictures, not the logits of labels; set "
                "decoder.kind to cnn"
            )
        if self.resolution % self.downsample_factor:
            raise ValueError(
                f"resolution {self.resolution} is not divisible by the downsample factor "
                f"{self.downsample_factor}, as a decoder of kind {decoder.kind} needs it; use "
                f"{(self.resolution // self.downsample_factor + 1) * self.downsample_factor}"
            )
        if (reason := decoder.unsuited(self.resolution, self.resolution)) is not None:
            raise ValueError(f"decoder, at resolution {self.resolution}: {reason}")


class LossConfig(Config):
    """Reconstruction and perceptual terms; the quantizer and the discriminator bring their own."""

    reconstruction: Literal["l1", "l2", "bce"] = "l1"
    """bce: binary cross-entropy with logits over one-hot labels, for segmentation and only for it."""
    pixel_weight: float = Field(default=1.0, ge=0)
    perceptual_weight: float = Field(default=1.0, ge=0)
    """Weight of LPIPS with VGG16 (Zhang et al. 2018, arXiv:1801.03924); 0 needs no VGG weights."""
    perceptual_precision: Literal["run", "fp32"] = "run"
    """run: VGG's features follow training.precision (in bf16 the gradient keeps its length, and its direction
    to a cosine of 0.99, and a small step takes two thirds of the time); they are compared in fp32."""
    vgg_weights: str | None = None
    """A file of torchvision's VGG16 weights; null: torchvision's cache, or its download."""


class VQOptimizerConfig(OptimizerConfig):
    """Adam with the published betas, or Muon for the weights between the first and the last layers."""

    method: Literal["adam", "muon"] = "adam"
    """muon (see taming.training.muon) needs a third of Adam's steps in short trainings; `betas` are those of
    the weights that stay with Adam. The discriminator always has Adam."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.5, 0.9)


class VQTrainConfig(Config):
    """A training run of stage one."""

    description: str = ""
    """One line for `taming vq configs`."""
    data: DataConfig
    model: VQModelConfig = VQModelConfig()
    loss: LossConfig = LossConfig()
    discriminator: AdversarialConfig | None = AdversarialConfig()
    """null: no adversarial term at all."""
    codebook_alarm: CodebookAlarmConfig | None = CodebookAlarmConfig()
    """Warns in the run's log where most codes are never chosen; null: says nothing."""
    optimizer: VQOptimizerConfig
    training: TrainingConfig
    init_from: str | None = None
    """A saved model (folder, run or hub id) whose weights are the start. Resolution, dropout and what only
    concerns training may differ; what changes the shapes or the meaning of weights may not."""
    train_only: Literal["decoder"] | None = None
    """decoder: encoder and codebook stay as in init_from, so that codes made with it keep their meaning."""

    def shortened(self, steps: int) -> VQTrainConfig:
        """The same training in `steps` steps: what is counted from its start keeps its share of the whole."""
        share = steps / self.training.steps
        discriminator = self.discriminator
        if discriminator is not None:
            counted = ("start_step", "warmup_steps", "ramp_steps")
            discriminator = discriminator.model_copy(
                update={name: round(getattr(discriminator, name) * share) for name in counted}
            )
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"steps": steps}),
                "optimizer": self.optimizer.shortened(share),
                "discriminator": discriminator,
            }
        )

    @model_validator(mode="after")
    def _suits_the_input(self) -> VQTrainConfig:
        if self.train_only is not None and self.init_from is None:
            raise ValueError(
                f"train_only {self.train_only} holds the rest of a model still: say which with init_from"
            )
        labels = self.model.input == "segmentation"
        if labels != (self.loss.reconstruction == "bce"):
            wanted = "bce" if labels else "l1 or l2"
            raise ValueError(
                f"loss.reconstruction {self.loss.reconstruction} does not suit model.input "
                f"{self.model.input}; set it to {wanted}"
            )
        if labels and self.loss.perceptual_weight:
            raise ValueError("label maps have no perceptual loss: set loss.perceptual_weight to 0")
        if labels and self.discriminator is not None:
            raise ValueError("a discriminator judges pictures, not label maps: set discriminator to null")
        return self
