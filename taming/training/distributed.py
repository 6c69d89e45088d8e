"""Devices, precision and agreement between processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from taming.collective import sum_over_processes
from taming.errors import UserError


def native_bf16() -> bool:
    """Whether this machine multiplies bf16 natively, so that it is faster than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases cannot tell; fp32 is then the choice that is never wrong.
    probe: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = probe()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def resolve_precision(precision: str) -> str:
    """Replace "auto" by "bf16" or "fp32", whichever is right for this machine."""
    if precision == "auto":
        return "bf16" if native_bf16() else "fp32"
    return precision


def make_accelerator(precision: str) -> Accelerator:
    """An Accelerator for "auto" | "bf16" | "fp32"; the number of processes comes from its launcher."""
    # Accelerate keeps the precision of a process's first run for all later ones, and refuses another.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision={"bf16": "bf16", "fp32": "no"}[resolve_precision(precision)])


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process; every process must call it."""
    value = torch.tensor([float(flag)], device=accelerator.device)
    return bool(sum_over_processes(value).item() > 0)


def reduced_if(last: bool, accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Around a micro-batch's backward: processes exchange the gradients of `model` only with the last one."""
    if last:
        return nullcontext()
    unreduced: AbstractContextManager[None] = accelerator.no_sync(model)
    return unreduced


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is. Raises UserError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no device {name!r} on this machine ({reason}); use --device cpu") from None
    return device
