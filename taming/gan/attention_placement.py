"""Where convolutional networks have self-attention, and of which widths."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from taming.config import Config
from taming.layers.non_local import NonLocalBlock

LARGEST_MAP = 64
"""Above it, attention at a map that nobody asked for would cost more than all convolutions."""


class SelfAttentionConfig(Config):
    """SAGAN's attention. The paper's text has value_ratio 8 and no pooling; its code is the default."""

    resolutions: tuple[int, ...] | None = None
    """Shorter sides of the maps that get a block; [] leaves attention out. null is the published place: 32
    cells, or half of the picture where that is less."""
    key_ratio: int = Field(default=8, ge=1)
    value_ratio: int = Field(default=2, ge=1)
    pool: bool = True
    """Keys and values are the maxima of 2 x 2 cells."""

    def unsuited(self, maps: Sequence[int]) -> str | None:
        """Why networks with maps of these sides cannot have it; None where they can."""
        absent = sorted(set(self.resolutions or ()) - set(maps))
        if not absent:
            return None
        return (
            f"attention.resolutions {absent} are no maps of this network, whose sides are "
            f"{sorted(set(maps))}; choose among these, or null for the published place"
        )

    def places(self, maps: Sequence[int], picture: int) -> tuple[int, ...]:
        """Indices into `maps`, the sides of a network's maps in its own order, that get a block.

        `picture` is the shorter side of the pictures. Of maps of one size the first gets it.
        """
        if self.resolutions is not None:
            return tuple(sorted(maps.index(side) for side in set(self.resolutions) if side in maps))
        wanted = min(32, picture // 2)
        # A trunk that begins above the published place (stage one) has it at its start.
        side = max((m for m in maps if m <= wanted), default=min(maps))
        return (maps.index(side),) if side <= LARGEST_MAP else ()

    def block(self, channels: int) -> NonLocalBlock:
        """A fresh block for maps of so many channels."""
        return NonLocalBlock(channels, key_ratio=self.key_ratio, value_ratio=self.value_ratio, pool=self.pool)
