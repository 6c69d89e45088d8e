"""Stage two with weights, gradients and optimiser states spread over all processes (FSDP)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from stage2_ar.model import ARModel
from taming.training.ema import Ema
from taming.training.sharded import (
    WholeCopy,
    shard,
    shard_like,
    whole_state_of,
    whole_state_of_optimizer,
)
from taming.training.sharding import Sharding


def shard_model(
    loss: nn.Module,
    model: ARModel,
    average: Ema | None,
    sharding: Sharding,
    accelerator: Accelerator,
    *,
    compiled: bool = False,
) -> WholeCopy:
    """Spread `model`, a part of `loss`, and its average; returns where they are evaluated in one piece.

    Nothing may be on the device before: weights go there a block at a time, since all of them need not fit.
    `compiled` runs blocks through torch.compile in training. State dicts of model and average stay whole.
    Optimisers are built afterwards.
    """
    device = accelerator.device
    copy = WholeCopy(model, device)
    # On a CPU not: its LayerNorm takes no bf16 weights for fp32 activations.
    bf16 = accelerator.mixed_precision == "bf16" and device.type == "cuda"
    block_dtype = torch.bfloat16 if bf16 else None
    shard(loss, model.transformer.blocks, sharding, device, block_dtype=block_dtype)
    if compiled:
        for block in model.transformer.blocks:
            # Inside of what gathers a block's weights, which is not to be compiled.
            block.forward = torch.compile(block.forward)
    whole_state_of(model)
    if average is None:
        copy.follow(model)
        return copy
    shard_like(average.module, model)
    average.n_averaged.data = average.n_averaged.to(device)
    whole_state_of(average.module)
    copy.follow(average.module)
    return copy


def whole_states(optimizers: Iterable[Optimizer]) -> None:
    """Make the state dicts of optimisers of a sharded model whole; Muon's are."""
    from taming.training.muon_sharded import ShardedMuon

    for optimizer in optimizers:
        if not isinstance(optimizer, ShardedMuon):
            whole_state_of_optimizer(optimizer)
