"""Weights, gradients and optimiser states spread over all processes (FSDP), and whole where they are kept.

Each process holds one part of every weight; a block's whole weights are there only while it computes (Zhao
et al. 2023, arXiv:2304.11277; torch's `fully_shard`). State dicts are whole, as if nothing was sharded:
checkpoints have one format, and go on with any number of processes, sharded or not. Whoever asks a sharded
module or its optimiser for their state therefore asks on every process; the main one gets the values, the
others tensors without any (on the device "meta").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.collective import world_size
from taming.training.sharding import Sharding

_GATHERS = ContextVar("gathers", default=True)


def shard(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    sharding: Sharding,
    device: torch.device,
    *,
    block_dtype: torch.dtype | None = None,
) -> None:
    """Spread the weights of `root` over all processes, in place; every process holds the same ones before.

    Each of `blocks` is gathered by itself when it computes, in `block_dtype` where one is given; the rest
    of `root` stays in fp32 and is gathered for the whole step. Gradients are averaged in fp32. Only `root`
    may be called in training. Optimisers are built afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    if sharding.by_block:
        # Inputs as they are: autocast casts what needs it, and the residual stream stays in fp32.
        policy = MixedPrecisionPolicy(
            param_dtype=block_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in blocks:
            fully_shard(
                block, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward, mp_policy=policy
            )
    fully_shard(root, mesh=mesh)


def shard_like(module: nn.Module, sharded: nn.Module) -> None:
    """Spread the weights of `module`, which is never called, as those of the same name in `sharded`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    layout = dict(sharded.named_parameters())
    for name, weight in list(module.named_parameters()):
        like = layout[name]
        assert isinstance(like, DTensor)
        part = distribute_tensor(
            weight.data.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
        _replace(module, name, part)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(next(iter(layout.values())).device)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of `module` are spread over processes."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(weight, DTensor) for weight in module.parameters())


def whole_state_of(module: nn.Module) -> None:
    """Make the state dict of a sharded `module` whole, both ways."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def gather(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if _GATHERS.get():
            for name in [name for name in state if name.startswith(prefix)]:
                state[name] = whole(state[name])

    def spread(owner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, weight in owner.named_parameters():
            value = state.get(prefix + name)
            if isinstance(weight, DTensor) and value is not None and not isinstance(value, DTensor):
                state[prefix + name] = distribute_tensor(
                    value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
                )

    module.register_state_dict_post_hook(gather)
    module.register_load_state_dict_pre_hook(spread)


def state_in_parts(module: nn.Module) -> dict[str, Any]:
    """The state dict of `module` with sharded weights as DTensors, whose shapes are whole; no exchange."""
    token = _GATHERS.set(False)
    try:
        return module.state_dict()
    finally:
        _GATHERS.reset(token)


def whole_state_of_optimizer(optimizer: Optimizer) -> None:
    """Make the state dict of an optimiser of sharded weights whole, both ways."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def gather(owner: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        entries = {
            index: {key: whole(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": entries}

    def spread(owner: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in owner.param_groups for weight in group["params"]]
        entries: dict[int, dict[str, Any]] = {}
        for index, values in state["state"].items():
            weight = weights[index]
            entries[index] = dict(values)
            for key, value in values.items():
                # A count of steps is no part of a weight.
                if isinstance(weight, DTensor) and isinstance(value, Tensor) and value.shape == weight.shape:
                    entries[index][key] = distribute_tensor(
                        value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
                    )
        return {**state, "state": entries}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(spread)


def whole(value: Any) -> Any:
    """A sharded tensor in one piece: in the main memory of the main process, without values elsewhere.

    Whatever else is given comes back as it is. Every process must call it.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    gathered: Tensor = value.full_tensor().detach()
    return gathered.cpu() if dist.get_rank() == 0 else torch.empty_like(gathered, device="meta")


class WholeCopy:
    """A plain copy of a sharded model, to evaluate, sample from and save.

    It is in the main memory of the main process, with the weights of when they were gathered last; other
    processes have them only inside `everywhere`.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Made of a model before it is sharded."""
        self.module: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
        self.device = device
        self._keep = dist.get_rank() == 0
        if not self._keep:
            self._forget()

    def follow(self, source: nn.Module) -> None:
        """Take over the weights of the sharded `source` whenever its whole state is asked for."""

        def take(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            if self._keep and _GATHERS.get():
                for name, _ in list(self.module.named_parameters()):
                    _replace(self.module, name, state[prefix + name])

        source.register_state_dict_post_hook(take)

    def take(self, source: nn.Module) -> None:
        """Gather the weights of the sharded `source`; every process must call it."""
        for name, weight in source.named_parameters():
            value = whole(weight)
            if self._keep:
                _replace(self.module, name, value)

    @contextmanager
    def everywhere(self, source: nn.Module) -> Iterator[None]:
        """Inside, the copy has the weights of `source` on the device of every process; all must enter."""
        from torch.distributed.tensor import DTensor

        for name, weight in source.named_parameters():
            assert isinstance(weight, DTensor)
            _replace(self.module, name, weight.full_tensor().detach())
        try:
            with self.on_device():
                yield
        finally:
            if not self._keep:
                self._forget()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the copy is on the device of this process."""
        self.module.to(self.device)
        try:
            yield
        finally:
            if self._keep:
                self.module.to("cpu")

    def _forget(self) -> None:
        for name, weight in list(self.module.named_parameters()):
            _replace(self.module, name, torch.empty(0, dtype=weight.dtype))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give the parameter `name` another tensor, without gradient."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
