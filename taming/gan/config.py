"""What a user can say about the training of a GAN."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from taming.config import Config
from taming.data.config import DataConfig
from taming.gan.critic_config import CriticConfig
from taming.gan.discriminators import DiscriminatorConfig
from taming.gan.generators import GeneratorConfig
from taming.training.config import OptimizerConfig, TrainingConfig


class GANOptimizerConfig(OptimizerConfig):
    """Adam without momentum, as GANs have it since TTUR (Heusel et al. 2017, arXiv:1706.08500)."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.0, 0.99)


class SuperResolutionConfig(Config):
    """Co-training on real pictures at low resolution (TransGAN, arXiv:2102.07074v1, section 3.3)."""

    weight: float = Field(default=50.0, gt=0)
    """Of the mean squared error between what is made of a low resolution and the real picture."""


class GANTrainConfig(CriticConfig):
    """A training run of a generator against a discriminator.

    A step is one update of the discriminator on one batch. training.ema_decay is that of the generator, an
    update of its own; training.clip_norm holds for each player by itself.
    """

    description: str = ""
    """One line for `taming gan configs`."""
    data: DataConfig
    class_conditional: bool = False
    """Paint, and judge, pictures of the data's classes."""
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    discriminator_steps: int = Field(default=1, ge=1)
    """The generator learns in every so many steps, the last of them."""
    generator_batch_size: int | None = Field(default=None, ge=1)
    """Pictures that the generator paints to learn from, over all processes and micro-batches; null:
    training.batch_size."""
    super_resolution: SuperResolutionConfig | None = None
    """For a generator that has a layer for it; null: none."""
    generator_optimizer: GANOptimizerConfig
    discriminator_optimizer: GANOptimizerConfig
    training: TrainingConfig

    @property
    def painted_batch_size(self) -> int:
        """Pictures that the generator learns from in a step."""
        return self.generator_batch_size or self.training.batch_size

    def shortened(self, steps: int) -> GANTrainConfig:
        """The same training in `steps` steps: what is counted from its start keeps its share of the whole."""
        share = steps / self.training.steps
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"steps": steps}),
                "generator_optimizer": self.generator_optimizer.shortened(share),
                "discriminator_optimizer": self.discriminator_optimizer.shortened(share),
            }
        )

    @model_validator(mode="after")
    def _fits_together(self) -> GANTrainConfig:
        size = self.data.height_width
        for name, player in (("generator", self.generator), ("discriminator", self.discriminator)):
            if (reason := player.unsuited(*size)) is not None:
                raise ValueError(f"{name}: {reason}")
        if self.class_conditional and not getattr(self.data, "class_labels", True):
            raise ValueError(
                "class_conditional needs pictures with classes; set data.class_labels: true, or "
                "class_conditional: false"
            )
        if self.class_conditional and not self.discriminator.takes_classes:
            raise ValueError(
                f"class_conditional: a discriminator of kind {self.discriminator.kind} does not judge "
                "classes; use sagan, transgan, vitgan or stransgan, or set class_conditional to false"
            )
        if self.painted_batch_size % self.training.accumulation:
            raise ValueError(
                f"generator_batch_size {self.painted_batch_size} is not divisible by training.accumulation "
                f"{self.training.accumulation}; use a multiple of it, or null"
            )
        return self

    @model_validator(mode="after")
    def _can_super_resolve(self) -> GANTrainConfig:
        layer: bool | None = getattr(self.generator, "super_resolution", None)
        if self.super_resolution is not None and layer is None:
            raise ValueError(
                f"super_resolution: a generator of kind {self.generator.kind} has no layer for pictures of "
                "low resolution; use transgan, or set super_resolution to null"
            )
        if (self.super_resolution is not None) != bool(layer):
            raise ValueError(
                "super_resolution and generator.super_resolution go together: set both, or neither "
                "(null and false)"
            )
        return self
