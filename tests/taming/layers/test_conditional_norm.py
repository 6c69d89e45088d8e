"""Conditional norms: tables of a row a class, one for all without classes, closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming.layers.conditional_norm import ConditionalNorm


def one_hot(*classes: int) -> Tensor:
    return F.one_hot(torch.tensor(classes), 3).float()


def filled(norm: ConditionalNorm) -> ConditionalNorm:
    torch.manual_seed(1)
    for table in (norm.gamma, norm.beta):
        torch.nn.init.normal_(table)
    return norm


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_each_picture_gets_the_row_of_its_class(kind: str):
    norm = filled(ConditionalNorm(6, 3, norm=kind))  # type: ignore[arg-type]
    x = 5 + 2 * torch.randn(3, 6, 4, 5)
    found = norm(x, one_hot(2, 0, 2))
    axes, groups = ((0, 2, 3), x) if kind == "batch" else ((1, 2, 3), x.view(6, 3, 4, 5))  # two of three
    centred = (groups - groups.mean(axes, keepdim=True)) / (
        groups.var(axes, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    rows = torch.tensor([2, 0, 2])
    wanted = centred.view_as(x) * norm.gamma[rows, :, None, None] + norm.beta[rows, :, None, None]
    torch.testing.assert_close(found, wanted)


def test_tables_begin_at_one_and_zero():
    norm = ConditionalNorm(4, 3)
    x = torch.randn(5, 4, 3, 3)
    plain = torch.nn.BatchNorm2d(4)
    torch.testing.assert_close(norm(x, one_hot(0, 1, 2, 0, 1)), plain(x))
    assert {tuple(p.shape) for p in norm.parameters()} == {(3, 4)}


def test_another_class_another_output_and_mixtures_lie_between():
    norm = filled(ConditionalNorm(4, 3)).eval()
    x = torch.randn(1, 4, 3, 3)
    first, second = norm(x, one_hot(0)), norm(x, one_hot(1))
    assert (first - second).abs().max() > 0.1
    torch.testing.assert_close(norm(x, (one_hot(0) + one_hot(1)) / 2), (first + second) / 2)
    unconditional = filled(ConditionalNorm(4))
    unconditional.eval()
    assert torch.equal(unconditional(x), unconditional(x, one_hot(1)))


def test_rows_are_exact_under_autocast():
    norm = filled(ConditionalNorm(4, 3)).eval()
    x = torch.randn(2, 4, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x, one_hot(2, 1)), norm(x, one_hot(2, 1)).float())
        found = norm(x, one_hot(2, 1))
    torch.testing.assert_close(found, norm(x, one_hot(2, 1)), rtol=1e-6, atol=1e-6)
