"""What a forward in train mode leaves behind in a module: statistics, power iterations, first batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from taming.layers.actnorm import ActNorm


class ForwardState:
    """That state of `module` as it is now, to go back to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        changing = [tensor for part in module.modules() for tensor in _changed_by_forward(part)]
        self._before = [(tensor, tensor.detach().clone()) for tensor in changing]

    @torch.no_grad()
    def restore(self) -> None:
        """What forward alone has changed is as it was."""
        for tensor, before in self._before:
            tensor.copy_(before)
        for part in self.module.modules():
            if isinstance(part, ActNorm):
                part.ready = False


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Forwards inside leave nothing behind."""
    state = ForwardState(module)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but not into its weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _changed_by_forward(part: nn.Module) -> Iterator[Tensor]:
    """The tensors of `part` alone that a forward in train mode may change."""
    for buffer in part.buffers(recurse=False):
        if buffer.is_floating_point() or buffer.ndim == 0:  # tables of indices and masks stay
            yield buffer
    if isinstance(part, ActNorm) and not part.ready:  # its first batch sets its weights
        yield from part.parameters(recurse=False)
