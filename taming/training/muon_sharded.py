"""Muon over matrices that are spread over processes (see muon.py).

Momentum stays in parts; of each matrix in turn, the update is gathered, made orthogonal on every process,
and each keeps the rows that are its own. That is no more work than every process does with whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from taming.training.sharded import whole

MOMENTUM = "momentum_buffer"


class ShardedMuon(Optimizer):
    """`ConvMuon` over sharded weights (out, in); its state dict is that of `ConvMuon` over whole ones.

    `parts` says of each weight how many matrices of equal sizes are stacked in it. Every process must call
    `step` and `state_dict`.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        parts: Sequence[int] | None = None,
    ) -> None:
        weights = list(weights)
        self._parts = [1] * len(weights) if parts is None else list(parts)
        # Alone, with no momentum and from zero, torch's Muon gives the step itself.
        self._alone = torch.optim.Muon(
            [nn.Parameter(torch.zeros(1, 1))],
            lr=lr,
            weight_decay=0.0,
            momentum=0.0,
            nesterov=False,
            adjust_lr_fn="match_rms_adamw",
        )
        like = torch.optim.Muon(
            [nn.Parameter(torch.zeros(1, 1))],
            lr=lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        super().__init__(weights, dict(like.defaults))
        self.register_state_dict_post_hook(_as_whole)
        self.register_load_state_dict_pre_hook(_as_parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients of the weights; a weight without one stays."""
        assert closure is None
        (group,) = self.param_groups
        for weight, count in zip(group["params"], self._parts, strict=True):
            if weight.grad is None:
                continue
            state, gradient = self.state[weight], weight.grad.to_local()
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(weight.detach())
            momentum: Tensor = state[MOMENTUM].to_local()
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
            step = self._orthogonal(_like(weight, update).full_tensor(), count, group["lr"])
            own: Tensor = weight.to_local()
            own.mul_(1 - group["lr"] * group["weight_decay"]).add_(_spread(weight, step).to_local())

    def _orthogonal(self, update: Tensor, count: int, lr: float) -> Tensor:
        """The step (out, in) along the whole matrices that are stacked in `update` (out, in)."""
        (group,) = self._alone.param_groups
        group["lr"] = lr
        steps = []
        for matrix in update.chunk(count):
            place = nn.Parameter(torch.zeros_like(matrix))
            place.grad, group["params"] = matrix, [place]
            self._alone.step()
            self._alone.state.clear()
            steps.append(place.detach())
        return torch.cat(steps)


def _as_whole(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state as `ConvMuon` has it: an entry for each matrix of the stacks."""
    assert isinstance(optimizer, ShardedMuon)
    entries: dict[int, dict[str, Any]] = {}
    first = 0
    for index, count in enumerate(optimizer._parts):
        if index in state["state"]:
            stack = whole(state["state"][index][MOMENTUM])
            entries |= {first + n: {MOMENTUM: matrix} for n, matrix in enumerate(stack.chunk(count))}
        first += count
    (group,) = state["param_groups"]
    return {"state": entries, "param_groups": [{**group, "params": list(range(first))}]}


def _as_parts(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """`_as_whole` the other way round."""
    assert isinstance(optimizer, ShardedMuon)
    entries: dict[int, dict[str, Any]] = {}
    first = 0
    weights = optimizer.param_groups[0]["params"]
    for index, (weight, count) in enumerate(zip(weights, optimizer._parts, strict=True)):
        found = [state["state"][first + n][MOMENTUM] for n in range(count) if first + n in state["state"]]
        if found:
            entries[index] = {MOMENTUM: _spread(weight, torch.cat(found).to(weight.device))}
        first += count
    (group,) = state["param_groups"]
    return {"state": entries, "param_groups": [{**group, "params": list(range(len(weights)))}]}


def _spread(weight: DTensor, value: Tensor) -> DTensor:
    """A whole tensor, which every process has, in the parts of `weight`."""
    return distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None)


def _like(weight: DTensor, own: Tensor) -> DTensor:
    """This process's part of what is spread as `weight` is."""
    return DTensor.from_local(
        own,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
