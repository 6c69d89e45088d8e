"""silu(gate) * up from one projection of both (Shazeer 2020, arXiv:2002.05202), keeping only its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2 C), gate first -> (..., C)."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        result: Tensor = _SwiGLU.apply(gate_up)
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Both gradients are written into one tensor: autograd would join two, and keep two more."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, functional.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out
