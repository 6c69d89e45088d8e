"""Two processes leave every quantizer with the same codes, and those of one process on the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from stage1_vq.quantizers import Quantizer, build_quantizer
from tests.contracts.test_quantizers import CONFIGS
from tests.ranks import run_ranks

STEPS = 5
DRAW = ("gumbel", "gumbel-soft")
"""Each process draws its own noise."""
HEALTHY = ("nearest-healthy", "ema-healthy", "simvq-healthy", "residual-healthy", "ibq-healthy")


def batch(code_dim: int, step: int) -> Tensor:
    return torch.randn(4, code_dim, 5, 8, generator=torch.Generator().manual_seed(step))


def train(rank: int, processes: int) -> dict[str, Tensor]:
    """State and, of the first step, gradients of every case."""
    result: dict[str, Tensor] = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        quantizer: Quantizer = build_quantizer(config)
        torch.manual_seed(rank)
        learns = any(True for _ in quantizer.parameters())
        wrapped = DistributedDataParallel(quantizer) if learns and processes > 1 else quantizer
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1) if learns else None
        for step in range(STEPS):
            quantizer.before_step(step, STEPS)
            # Rows of the whole batch in the order of ranks.
            z = batch(quantizer.code_dim, step).chunk(processes)[rank].requires_grad_()
            output = wrapped(z)
            (output.quantized.square().mean() + output.loss).backward()
            if step == 0:
                grads = [parameter.grad for parameter in quantizer.parameters()]
                result |= {f"{name}/grad/{i}": g.clone() for i, g in enumerate(grads) if g is not None}
                if not learns:  # the average that DDP would take of what lies before the quantizer
                    assert z.grad is not None
                    result[f"{name}/latents/{rank}"] = z.grad / processes
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            quantizer.after_step()
        result |= {f"{name}/state/{key}": value.clone() for key, value in quantizer.state_dict().items()}
    return result


def train_as_one_of_two(rank: int) -> dict[str, np.ndarray]:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    return {key: value.numpy() for key, value in train(rank, 2).items()}


@pytest.mark.slow
def test_two_processes_agree_with_one():
    outcomes = run_ranks(train_as_one_of_two, 2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    first, second = ({k: torch.from_numpy(v) for k, v in o.result.items()} for o in outcomes)
    alone = train(0, 1)
    compared = set()
    for key, value in first.items():
        name, kind, _ = key.split("/", 2)
        if kind == "latents":
            both = torch.cat((value, second[f"{name}/latents/1"]))
            assert_close(both, alone[key], rtol=1e-4, atol=1e-6, msg=f"{key} differs from one process's")
            continue
        assert_close(value, second[key], rtol=0, atol=0, msg=f"processes differ in {key}")
        if name not in DRAW:
            assert_close(value, alone[key], rtol=1e-3, atol=1e-5, msg=f"{key} differs from one process's")
            compared.add(name)
    assert compared == CONFIGS.keys() - set(DRAW)
    for name in HEALTHY:
        assert all(value for key, value in first.items() if key.startswith(name) and "initialised" in key)
