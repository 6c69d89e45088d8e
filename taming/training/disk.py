"""The room that a run will need on its disk, foreseen at its start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from taming.disk import folder_bytes, free_bytes
from taming.errors import UserError
from taming.tensor_file import tensor_bytes
from taming.training.sharded import state_in_parts
from taming.units import format_bytes

ADAM_MOMENTS = 2
"""Tensors of a parameter's size that its optimiser will keep, where it has none yet; Muon keeps fewer."""


def check_disk(
    run: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], keep: int
) -> None:
    """Whether the disk of `run` takes `keep` checkpoints, one more while it is written, and the model twice.

    What `run` holds already counts as room: it is replaced. Raises UserError before a run that would end
    with a full disk.
    """
    checkpoint = checkpoint_bytes(modules, optimizers)
    # Of a model and its averaged copy one is what users get.
    model = sum(tensor_bytes(state_in_parts(module)) for name, module in modules.items() if name != "ema")
    needed = (keep + 1) * checkpoint + 2 * model
    free = free_bytes(run) + folder_bytes(run / "checkpoints") + folder_bytes(run / "model")
    if free < needed:
        raise UserError(
            f"the run needs about {format_bytes(needed)} in {run} ({keep + 1} checkpoints of "
            f"{format_bytes(checkpoint)} and the model of {format_bytes(model)} twice), and "
            f"{format_bytes(free)} are to be had there; free some space, lower training.keep_checkpoints, "
            "or set training.output to another disk"
        )


def checkpoint_bytes(modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> int:
    """What a checkpoint takes; optimisers that have made no step yet are counted as Adam's."""
    total = sum(tensor_bytes(state_in_parts(module)) for module in modules.values())
    for optimizer in optimizers.values():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        total += ADAM_MOMENTS * sum(p.numel() * p.element_size() for p in parameters)
    return total
