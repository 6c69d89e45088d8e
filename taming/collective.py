"""The few exchanges between processes that models make themselves; no-ops in a single process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
