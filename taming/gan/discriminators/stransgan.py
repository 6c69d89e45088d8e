"""STransGAN's discriminator."""

from __future__ import annotations

from typing import ClassVar, Literal

from taming.config import Config


class STransGANDiscriminatorConfig(Config):
    kind: Literal["stransgan"] = "stransgan"
    takes_classes: ClassVar[bool] = True

    def unsuited(self, height: int, width: int) -> str | None:
        """Why pictures of this size cannot be judged; None where they can."""
        return None
