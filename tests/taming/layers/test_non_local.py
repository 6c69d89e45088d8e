"""SAGAN's attention: against explicit loops, the identity at the start, pooled keys of odd maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from taming.layers.non_local import NonLocalBlock


def make(channels: int = 8, **options: object) -> NonLocalBlock:
    torch.manual_seed(0)
    block = NonLocalBlock(channels, **options).eval()  # type: ignore[arg-type]
    torch.nn.init.constant_(block.gamma, 0.7)
    return block


@torch.no_grad()
def by_loops(block: NonLocalBlock, x: Tensor) -> Tensor:
    """y_i = x_i + gamma * o(sum_j softmax_j(theta_i . phi_j) g_j), one picture, cell by cell."""

    def cells(layer: torch.nn.Module, pool: bool) -> list[Tensor]:
        h = torch.einsum("oi,ihw->ohw", layer.weight[:, :, 0, 0], x)
        _, height, width = h.shape
        step = 2 if pool else 1
        return [
            h[:, i : i + step, j : j + step].amax((1, 2))
            for i in range(0, height, step)
            for j in range(0, width, step)
        ]

    keys, values = cells(block.phi, block.pool), cells(block.g, block.pool)
    outputs = []
    for query in cells(block.theta, False):
        weights = [math.exp(float(query @ key)) for key in keys]
        seen = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        outputs.append(block.o.weight[:, :, 0, 0] @ seen)
    return x + block.gamma * torch.stack(outputs, 1).view_as(x)


@pytest.mark.parametrize(
    "options", [{}, {"value_ratio": 8, "pool": False}, {"key_ratio": 2}], ids=["code", "paper", "wide"]
)
def test_is_what_loops_say(options: dict[str, object]):
    block = make(**options)
    x = 3 * torch.randn(2, 8, 5, 4)
    found = block(x)
    for picture, wanted in zip(found, x, strict=True):
        torch.testing.assert_close(picture, by_loops(block, wanted), rtol=1e-4, atol=1e-5)


def test_probabilities_are_those_of_the_forward():
    block = make(16)
    x = torch.randn(2, 16, 6, 5)
    weights = block.probabilities(x)
    assert weights.shape == (2, 1, 30, 9)
    assert block.key_grid(6, 5) == (3, 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 1, 30))
    value = torch.nn.functional.max_pool2d(block.g(x), 2, ceil_mode=True).flatten(2)  # (B, C', M)
    seen = (weights[:, 0] @ value.mT).mT.unflatten(2, (6, 5))
    torch.testing.assert_close(block(x), x + 0.7 * block.o(seen), rtol=1e-4, atol=1e-5)


def test_begins_as_the_identity_and_learns_to_look():
    torch.manual_seed(0)
    block = NonLocalBlock(8)
    x = torch.randn(2, 8, 6, 6)
    y = block(x)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    assert block.gamma.grad is not None
    assert block.gamma.grad.abs() > 1e-3
    assert block.theta.parametrizations.weight.original.grad.abs().max() == 0  # gamma is zero
