"""What a user can say about how a discriminator learns, in stage one and in a GAN by itself."""

from __future__ import annotations

from pydantic import Field

from taming.config import Config
from taming.gan.augment import AugmentConfig
from taming.gan.losses import AdversarialLoss
from taming.gan.regularisers import ConsistencyConfig, GradientPenaltyConfig, LeCamConfig, R1Config


class CriticConfig(Config):
    """Its loss, what it sees, and what keeps it from growing too sure of itself."""

    loss: AdversarialLoss = "hinge"
    augment: AugmentConfig = AugmentConfig()
    """What is done at random to the pictures that it sees, and only to those: with few training pictures it
    would otherwise know them by heart. Names alone, or names and their settings."""
    r1: R1Config | None = None
    """Gradient penalty on real pictures; null: none."""
    gradient_penalty: GradientPenaltyConfig | None = None
    """Pull of the gradient to length one between real and fake pictures, as wasserstein wants; null: none."""
    drift: float = Field(default=0.0, ge=0)
    """Weight of the squared mean of real logits, which have no zero of their own with wasserstein."""
    lecam: LeCamConfig | None = None
    """Pull of the logits towards each other's running means, for few training pictures; null: none."""
    consistency: ConsistencyConfig | None = None
    """Pull of the logits of a picture and of an augmented view of it towards each other; null: none."""
