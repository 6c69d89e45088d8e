"""Muon over the weights of convolutions."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from taming.training.muon import ConvMuon


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_that_of_the_matrix(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3).to(memory_format=layout)
    gradient = torch.randn(8, 6, 3, 3)  # contiguous, whatever the weight's layout
    matrix = nn.Parameter(conv.weight.detach().contiguous().view(8, -1).clone())
    reference = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    ours = ConvMuon([conv.weight], lr=0.1)
    for _ in range(3):
        conv.weight.grad, matrix.grad = gradient.clone(), gradient.view(8, -1).clone()
        ours.step()
        reference.step()
    # The orthogonal matrix is found in bf16, where the order of the columns matters a little.
    assert_close(conv.weight.detach().reshape(8, -1), matrix.detach(), rtol=0, atol=5e-3)
    assert (conv.weight.detach().reshape(8, -1) - matrix.detach()).norm() < 0.02 * 0.3 * matrix.norm() + 0.02
    ours.zero_grad()
    assert conv.weight.grad is None


def test_the_step_has_orthogonal_rows_and_the_length_of_adams() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 4, 3, 3))
    optimizer = ConvMuon([weight], lr=1.0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    step = weight.detach().view(16, -1)
    assert 0.1 < step.square().mean().sqrt() < 0.3
    # Newton and Schulz's five rounds bring all singular values near one, not to it.
    values = torch.linalg.svdvals(step)
    assert values.max() / values.min() < 2.5


def test_state_round_trips() -> None:
    torch.manual_seed(0)

    def make() -> tuple[nn.Conv2d, ConvMuon]:
        conv = nn.Conv2d(3, 4, 3)
        return conv, ConvMuon([conv.weight], lr=0.1)

    def step(conv: nn.Conv2d, optimizer: ConvMuon, seed: int) -> None:
        conv.weight.grad = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    first, optimizer = make()
    step(first, optimizer, 1)
    second, resumed = make()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    step(first, optimizer, 2)
    step(second, resumed, 2)
    assert torch.equal(first.weight, second.weight)


def test_stacked_matrices_are_made_orthogonal_one_by_one() -> None:
    torch.manual_seed(0)
    stacked = nn.Linear(6, 12, bias=False)
    parts = [nn.Parameter(part.clone()) for part in stacked.weight.detach().chunk(3)]
    ours = ConvMuon([stacked.weight], 0.1, weight_decay=0.1, parts=[3])
    theirs = torch.optim.Muon(parts, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        stacked.weight.grad = torch.randn(12, 6)
        for part, gradient in zip(parts, stacked.weight.grad.chunk(3), strict=True):
            part.grad = gradient.clone()
        ours.step()
        theirs.step()
    assert_close(stacked.weight.detach(), torch.cat(parts).detach())
