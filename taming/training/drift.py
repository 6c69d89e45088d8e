"""Whether all processes still hold the same weights: a check for debugging, since nothing else would tell."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from taming.collective import gather_rows, world_size
from taming.errors import UserError
from taming.training.sharded import state_in_parts


def verify_processes(modules: Mapping[str, nn.Module], step: int) -> None:
    """Compare the bits of all weights and buffers of `modules`, by name, over processes, after `step` steps.

    Every process must call it. It reads all of them to the host, which takes about a second a gigabyte.
    Sharded weights, which differ by right, are left out.
    Raises UserError on every process, naming what differs and where.
    """
    if world_size() == 1:
        return
    from torch.distributed.tensor import DTensor

    state = {
        f"{name}/{key}": value
        for name, module in modules.items()
        for key, value in state_in_parts(module).items()
        if not isinstance(value, DTensor)
    }
    device = next((value.device for value in state.values() if value.device.type != "cpu"), "cpu")
    digests = torch.tensor([_digest(value) for value in state.values()], dtype=torch.int64, device=device)
    table = gather_rows(digests[None]).cpu()
    different = (table != table[0]).any(0)
    if different.any():
        names = [name for name, differs in zip(state, different.tolist(), strict=True) if differs]
        ranks = [rank for rank, row in enumerate(table) if not torch.equal(row, table[0])]
        raise UserError(
            f"processes have drifted apart by step {step}: {len(names)} of {len(state)} tensors differ, "
            f"{', '.join(names[:3])} among them, between process 0 and {', '.join(map(str, ranks))}; go on "
            "from a checkpoint before it, and please report the config: this is a fault of the toolkit or of "
            "the machine"
        )


def _digest(tensor: Tensor) -> int:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return int.from_bytes(hashlib.sha256(data.tobytes()).digest()[:8], "little", signed=True)
