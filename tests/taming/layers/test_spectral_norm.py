"""Spectral norms beside torch's own, held still, turned back, and averaged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from taming.building import build_with
from taming.layers.spectral_norm import (
    Directions,
    spectral_norm,
    spectral_norms,
    still,
)
from taming.training.ema import Ema


def largest(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1), 2))


def test_it_is_torchs_parametrisation_with_torchs_names():
    torch.manual_seed(0)
    theirs = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    ours = spectral_norm(nn.Conv2d(3, 8, 3))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 6, 6)
    for _ in range(3):
        a, b = ours(x).square().sum(), theirs(x).square().sum()
        torch.testing.assert_close(a, b)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(
                *(torch.autograd.grad(v, w, retain_graph=True)[0] for v, w in ((a, p), (b, q)))
            )


@pytest.mark.parametrize("keep_initial", [False, True])
def test_the_norm_stays_what_it_should_be_while_the_weight_changes(keep_initial: bool):
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(12, 20), keep_initial=keep_initial)
    wanted = largest(layer.parametrizations.weight.original) if keep_initial else 1.0
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(5).add_(torch.randn(20, 12))
    for _ in range(100):
        layer(torch.zeros(1, 12))
    assert largest(layer.eval().weight) == pytest.approx(wanted, rel=0.01)
    again = build_with(
        lambda: spectral_norm(nn.Linear(12, 20), keep_initial=keep_initial), layer.state_dict(), source="x"
    )
    torch.testing.assert_close(again.eval().weight, layer.weight)


def test_still_and_turned_back():
    torch.manual_seed(0)
    network = nn.Sequential(spectral_norm(nn.Linear(6, 7)), nn.ReLU(), spectral_norm(nn.Linear(7, 2)))
    x = torch.randn(3, 6)
    before = Directions(network)
    start = [part._u.clone() for part in spectral_norms(network).values()]
    first = network(x)
    moved = [part._u.clone() for part in spectral_norms(network).values()]
    assert not torch.equal(moved[0], start[0])
    with still(network):
        torch.testing.assert_close(network(x), first, rtol=0, atol=1e-6)  # the norms of the last forward
    assert all(part.training for part in spectral_norms(network).values())
    before.turn_back()
    assert all(torch.equal(p._u, u) for p, u in zip(spectral_norms(network).values(), start, strict=True))
    assert torch.equal(network(x), first)


def test_an_average_of_weights_keeps_its_norm():
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(8, 8))
    ema = Ema(layer, 0.9)
    for _ in range(40):
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(0.3 * torch.randn(8, 8))
        layer(torch.zeros(1, 8))
        ema.update(layer)
    assert largest(ema.module.weight) == pytest.approx(1, abs=0.1)
    # Without directions of length one it would be off by the loss of length of their average.
    lengths = [float(part._u.norm()) for part in spectral_norms(ema.module).values()]
    assert lengths[0] < 0.97


def test_copies_share_nothing():
    layer = spectral_norm(nn.Linear(3, 3))
    other = copy.deepcopy(layer)
    layer(torch.zeros(1, 3))
    assert not torch.equal(layer.state_dict()["parametrizations.weight.0._u"], torch.zeros(3))
    assert other.parametrizations.weight.original is not layer.parametrizations.weight.original
