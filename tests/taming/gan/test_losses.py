"""What the players minimise, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from taming.gan.losses import discriminator_loss, generator_loss

REAL, FAKE = torch.tensor([[[[0.5, 3.0]]]]), torch.tensor([[[[-2.0, 0.25]]]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_hinge():
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.625))
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(0.875)


@pytest.mark.parametrize("kind", ["vanilla", "non_saturating"])
def test_logistic(kind: str):
    wanted = 0.25 * (softplus(-0.5) + softplus(-3) + softplus(-2) + softplus(0.25))
    assert discriminator_loss(REAL, FAKE, kind).item() == pytest.approx(wanted)


def test_the_generator_of_vanilla_is_as_published_and_that_of_non_saturating_is_goodfellows():
    assert generator_loss(FAKE, "vanilla").item() == pytest.approx(0.875)
    wanted = 0.5 * (softplus(2) + softplus(-0.25))
    assert generator_loss(FAKE, "non_saturating").item() == pytest.approx(wanted)


def test_wasserstein_is_the_difference_of_means():
    assert discriminator_loss(REAL, FAKE, "wasserstein").item() == pytest.approx(0.5 * (-0.875 - 1.75))
    assert generator_loss(FAKE, "wasserstein").item() == pytest.approx(0.875)


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non_saturating", "wasserstein"])
def test_any_shape_of_logits_is_averaged(kind: str):
    shapes = [(2, 1), (2, 1, 3), (2, 1, 3, 5)]
    values = [discriminator_loss(torch.full(s, 0.3), torch.full(s, 0.2), kind).item() for s in shapes]
    assert values == pytest.approx([values[0]] * 3)
