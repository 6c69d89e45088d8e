"""Gradients of a player: their length, found once, and whose fault it is where they are not finite."""

# Annotations are no strings here: DDP looks at those of its hook.
import warnings
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from taming.collective import world_size


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Length () of all gradients together, on their device; not finite where one of them is not.

    Of sharded ones it is sharded too: `whole_norm` tells it.
    """
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def whole_norm(norm: Tensor) -> Tensor:
    """A length () that may be sharded, in one piece: then every process must call it."""
    if world_size() == 1:
        return norm
    from torch.distributed.tensor import DTensor

    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, largest: float | None) -> None:
    """Scale gradients of the length `norm` down to `largest`; None leaves them."""
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)


class OwnGradients:
    """Watches what this process brings to the average over processes, which hides where a NaN came from."""

    def __init__(self, model: nn.Module) -> None:
        """`model` as it was wrapped for several processes; of other wrappers than DDP nothing is known."""
        self._sums: list[Tensor] | None = None
        if isinstance(model, DistributedDataParallel):
            self._sums = []
            # Of weights with one output channel, whose first stride means nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            model.register_comm_hook(self._sums, _note_and_average)

    def take(self) -> Tensor | None:
        """() that is not finite where a gradient of this process was not; None where that is not known."""
        if not self._sums:
            return None
        total = torch.stack(self._sums).sum()
        self._sums.clear()
        return total


def _note_and_average(sums: list[Tensor], bucket: dist.GradBucket) -> Future[Tensor]:
    sums.append(bucket.buffer().sum())
    assert dist.group.WORLD is not None
    return allreduce_hook(dist.group.WORLD, bucket)
