"""Pictures by two players: discriminators, generators and their losses. The public face is `GANModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taming.gan.model import GANModel

__all__ = ["GANModel"]


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can show its help without importing torch.
    if name == "GANModel":
        from taming.gan.model import GANModel

        return GANModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
