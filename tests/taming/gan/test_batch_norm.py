"""Batch normalisation over processes is that of the whole batch, to its second derivative."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from taming.collective import choose_rows, gather_rows
from taming.gan.regularisers import gradient_penalty
from taming.layers.batch_norm import SharedBatchNorm2d
from tests.ranks import run_ranks


def pictures() -> Tensor:
    offset = 100 * torch.arange(6.0)[None, :, None, None]  # far from zero: squares would lose the variance
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) + offset


def figures(x: Tensor, processes: int) -> dict[str, Tensor]:
    """Of a small discriminator: logits, buffers, and the gradients of a loss with a penalty."""
    torch.manual_seed(0)
    norm = SharedBatchNorm2d(6)
    network = nn.Sequential(norm, nn.Conv2d(6, 1, 3), nn.Softplus())
    x = x.requires_grad_()
    logits = network(x)
    (logits.mean() + gradient_penalty(logits, x)).backward()
    result = {"logits": logits.detach(), "pictures": x.grad / processes}
    result["plain"] = SharedBatchNorm2d(6, affine=False)(x.detach())
    result |= {f"state/{name}": value for name, value in network.state_dict().items()}
    gradients = {f"grad/{name}": p.grad for name, p in network.named_parameters()}
    return result | {name: gather_rows(g[None]).mean(0) for name, g in gradients.items()}


def part(rank: int) -> dict[str, np.ndarray]:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    result = figures(pictures().chunk(2)[rank].clone(), 2)
    rows = torch.arange(6.0).view(3, 2) + 10 * rank
    result["chosen"] = choose_rows(rows, torch.tensor([4, 0, 0, 5]))
    return {name: value.numpy() for name, value in result.items()}


def test_two_processes_see_one_batch():
    outcomes = run_ranks(part, 2)
    assert [outcome.error for outcome in outcomes] == [None, None]
    first, second = ({n: torch.from_numpy(v) for n, v in o.result.items()} for o in outcomes)
    alone = figures(pictures(), 1)
    for name, wanted in alone.items():
        if name in ("logits", "pictures", "plain"):
            found = torch.cat((first[name], second[name]))
        else:
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=name)
    assert first["chosen"].tolist() == second["chosen"].tolist() == [[12, 13], [0, 1], [0, 1], [14, 15]]
