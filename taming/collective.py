"""The few exchanges between processes that models make themselves; no-ops in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Of this process, in [0, world_size())."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's `tensor`, which must have one shape; the argument stays as it is."""
    if world_size() == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean of every process's `tensor`; the argument stays as it is."""
    return tensor if world_size() == 1 else sum_over_processes(tensor) / world_size()


def from_main_process(tensor: Tensor) -> Tensor:
    """The main process's `tensor` on every process."""
    if world_size() == 1:
        return tensor
    sent = tensor.detach().clone()
    dist.broadcast(sent, src=0)
    return sent


def gather_rows(tensor: Tensor) -> Tensor:
    """Every process's rows (N, ...) in the order of ranks; N must be the same on all of them."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def stack_over_processes(tensor: Tensor) -> Tensor:
    """Every process's `tensor` (...), stacked (world_size, ...); gradients pass, of any order.

    A process's gradient is that of the sum of all processes' losses, which every process must
    differentiate together.
    """
    if world_size() == 1:
        return tensor[None]
    places = [torch.zeros_like(tensor)] * world_size()
    places[process_rank()] = tensor
    stacked: Tensor = _Sum.apply(torch.stack(places))
    return stacked


def choose_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """The rows `indices` (M,) of all processes' `rows` (N, ...) in the order of ranks, on every process.

    N and `indices` must be the same on all of them.
    """
    if world_size() == 1:
        return rows[indices]
    own = indices - process_rank() * len(rows)
    here = (own >= 0) & (own < len(rows))
    chosen = rows.new_zeros(len(indices), *rows.shape[1:])
    chosen[here] = rows[own[here]]
    return sum_over_processes(chosen)


class _Sum(Function):
    """The sum over processes; its gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return sum_over_processes(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gradient: Tensor = _Sum.apply(grads[0].contiguous())
        return gradient
