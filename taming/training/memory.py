"""An estimate of a training step's memory: weights, and every tensor that autograd keeps, counted once.

Where the forward never looks at values it can be run under torch's FakeTensorMode, in which tensors have
shapes but no storage: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def saved_bytes(forward: Callable[[], Any], parameters: set[int] | None = None) -> int:
    """Bytes that autograd keeps between `forward` and its backward; storages of `parameters` excluded."""
    seen: dict[int, tuple[Tensor, int]] = {}
    excluded = parameters or set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            # The tensor is kept so that its storage's address cannot be used again.
            seen[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(size for _, size in seen.values())


def without_values(build: Callable[[], Module]) -> Module:
    """What `build` makes, with tensors that have no storage; to be called under FakeTensorMode.

    It is built on the device `meta`: some of torch's initialisations look at values.
    """
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        module = build()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return module


def parameter_storages(module: nn.Module) -> set[int]:
    """Identities of the storages of a module's parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def state_bytes(module: nn.Module, *, optimizer: bool = True, ema: bool = False) -> int:
    """Bytes of fp32 weights, their gradients, Adam's two moments and the averaged copy."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(t.numel() for t in [*module.parameters(), *module.buffers()])
    return 4 * (total * (2 if ema else 1) + (3 * trainable if optimizer else 0))
