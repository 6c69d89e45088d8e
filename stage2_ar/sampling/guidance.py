"""Classifier-free guidance: how strongly, and when.

Guided logits are unconditional + s (conditional - unconditional) (Ho and Salimans 2022, arXiv:2207.12598). A
scale that is low while the layout of a picture is decided and high while it is filled in keeps more variety
than one scale throughout; the cosine with a power is that of Gao et al. 2023 (arXiv:2303.14389), as
autoregressive models of pictures use it.

Axes: B pictures, V codes.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from taming.errors import UserError

GuidanceSchedule = Literal["constant", "linear", "cosine"]


def scale_at(share: float, *, schedule: GuidanceSchedule, start: float, scale: float, power: float) -> float:
    """The scale when `share` in [0, 1] of a picture's other cells is done: `start` at 0, `scale` at 1.

    linear: start + (scale - start) t. cosine: t is replaced by (1 - cos(pi t^power)) / 2: a power above 1
    stays near `start` for longer. constant: `scale` throughout.
    """
    match schedule:
        case "constant":
            return scale
        case "linear":
            return start + (scale - start) * share
        case "cosine":
            return start + (scale - start) * (1 - math.cos(math.pi * share**power)) / 2


def check_guidance(*, schedule: str, start: float, scale: float, power: float) -> None:
    """Raises UserError for values out of range."""
    for name, value in (("guidance_scale", scale), ("guidance_start", start)):
        if not abs(value) < float("inf"):
            raise UserError(f"{name} {value} is not a finite number; 1 is no guidance")
    if schedule not in get_args(GuidanceSchedule):
        raise UserError(
            f"guidance_schedule {schedule!r} is unknown; choose {', '.join(get_args(GuidanceSchedule))}"
        )
    if not 0 < power < float("inf"):
        raise UserError(f"guidance_power {power} is not a finite number above 0")


def guided(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Logits (2 B, ..., V), conditional half first, -> guided logits (B, ..., V) fp32.

    A `scale` that differs from cell to cell broadcasts against the result.
    """
    conditional, unconditional = logits.float().chunk(2)
    if isinstance(scale, Tensor):
        return torch.addcmul(unconditional, scale.to(unconditional), conditional - unconditional)
    return unconditional + scale * (conditional - unconditional)
