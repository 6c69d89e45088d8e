"""What a user can say about the second player of stage one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from taming.gan.critic_config import CriticConfig
from taming.gan.discriminators import DiscriminatorConfig
from taming.gan.discriminators.patchgan import PatchGANConfig
from taming.training.guard import GuardConfig
from taming.training.plateau import PlateauConfig


class AdversarialConfig(CriticConfig):
    """The second player, and when it plays."""

    network: DiscriminatorConfig = PatchGANConfig()
    weight: float = Field(default=0.8, ge=0)
    weight_mode: Literal["adaptive", "fixed"] = "adaptive"
    """adaptive: times the ratio of both losses' gradients at the decoder's last layer."""
    start_step: int = Field(default=0, ge=0)
    """From this step on the discriminator learns; before, it costs nothing."""
    start_on_plateau: PlateauConfig | None = None
    """Start before start_step where the reconstruction loss has stopped falling; null: never before."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps that it learns before its judgement reaches the decoder."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps over which that judgement then grows to its full weight."""
    learning_rate_ratio: float = Field(default=1.0, gt=0)
    """Its learning rate as a multiple of the autoencoder's."""
    guard: GuardConfig | None = GuardConfig()
    """Goes back to a healthy state where the judgement has ruined the reconstruction; null: never."""

    @model_validator(mode="after")
    def _can_start_before(self) -> AdversarialConfig:
        if self.start_on_plateau is not None and self.start_step < 2 * self.start_on_plateau.window:
            raise ValueError(
                f"start_on_plateau compares two windows of {self.start_on_plateau.window} steps, and "
                f"start_step {self.start_step}, the latest start, comes before their end; raise start_step"
            )
        return self

    def factor(self, steps: int) -> float:
        """Share in [0, 1] of the judgement that reaches the decoder after so many steps of learning."""
        since = steps - self.warmup_steps
        if since < 0:
            return 0.0
        return min(1.0, (since + 1) / (self.ramp_steps + 1))
