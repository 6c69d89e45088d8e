"""Stage two: a transformer that writes grids of codes. The public face is `ARPipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage2_ar.pipeline import ARPipeline

__all__ = ["ARPipeline"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can show its help without importing torch.
    if name == "ARPipeline":
        from stage2_ar.pipeline import ARPipeline

        return ARPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
