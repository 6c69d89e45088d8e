"""Stage one: pictures to codes and back. The public face is `VQModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage1_vq.model import VQModel

__all__ = ["VQModel"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can show its help without importing torch.
    if name == "VQModel":
        from stage1_vq.model import VQModel

        return VQModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
