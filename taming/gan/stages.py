"""What the stages of a hierarchical transformer must agree on."""

from __future__ import annotations

from collections.abc import Sequence


def check_stages(widths: Sequence[int], depths: Sequence[int], num_heads: int) -> None:
    """One width, which the heads divide, and one depth a stage. Raises ValueError, as validators do."""
    if len(widths) != len(depths):
        raise ValueError(f"{len(widths)} widths and {len(depths)} depths: give one of each a stage")
    for width in widths:
        if width < 1 or width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
    if any(depth < 1 for depth in depths):
        raise ValueError(f"depths {depths}: each stage has at least one block")
