"""R1 and LeCAM against closed forms, finite differences and a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taming.gan.discriminators.patchgan import PatchGAN, PatchGANConfig
from taming.gan.regularisers import (
    LeCam,
    LeCamConfig,
    R1Config,
    drift,
    gradient_penalty,
    interpolate,
    unit_gradient_penalty,
)


def test_penalty_of_a_linear_judge_is_its_squared_norm():
    pictures = torch.randn(5, 3, 4, 4).requires_grad_()
    judge = nn.Conv2d(3, 1, 4)
    penalty = gradient_penalty(judge(pictures), pictures)
    assert penalty.item() == pytest.approx(judge.weight.square().sum().item(), rel=1e-5)
    # d |w|^2 / dw = 2 w
    penalty.backward()
    torch.testing.assert_close(judge.weight.grad, 2 * judge.weight.detach())


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_second_derivative_equals_finite_differences(norm: str):
    torch.manual_seed(0)
    judge = PatchGAN(PatchGANConfig(channels=4, num_layers=1, norm=norm)).double()
    if norm == "spectral":
        judge.eval()  # the power iteration holds still
    pictures = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    name, weight = next((n, p) for n, p in judge.named_parameters() if p.ndim == 4)

    def penalty() -> torch.Tensor:
        leaf = pictures.clone().requires_grad_()
        logits = judge(leaf)
        per_picture = logits.flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(per_picture.sum(), leaf, create_graph=True)
        wanted = gradient.square().flatten(1).sum(1).mean()
        found = gradient_penalty(judge(leaf), leaf)
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        return wanted

    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn_like(weight)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * step * direction)
        values.append(penalty().item())
        with torch.no_grad():
            weight.sub_(sign * step * direction)
    assert (gradient * direction).sum().item() == pytest.approx(
        (values[0] - values[1]) / (2 * step), rel=1e-3
    ), name


def test_a_lazy_penalty_weighs_as_much_on_average():
    config = R1Config(weight=4, interval=8)
    total = sum(config.factor() for step in range(80) if config.due(step))
    assert total / 80 == pytest.approx(0.5 * 4)


def test_lecam_is_the_loop():
    torch.manual_seed(0)
    lecam = LeCam(LeCamConfig(decay=0.9))
    mean_real = mean_fake = None
    for _ in range(6):
        real, fake = torch.randn(4, 1, 2, 2) + 1, torch.randn(4, 1, 2, 2) - 1
        found = lecam(real, fake)
        wanted = 0.0
        if mean_real is not None:
            wanted = ((real - mean_fake) ** 2).mean() + ((fake - mean_real) ** 2).mean()
        assert found.item() == pytest.approx(float(wanted), rel=1e-5)
        first = mean_real is None
        mean_real = real.mean() if first else 0.9 * mean_real + 0.1 * real.mean()
        mean_fake = fake.mean() if first else 0.9 * mean_fake + 0.1 * fake.mean()
        lecam.update(real.mean(), fake.mean())
    again = LeCam(LeCamConfig(decay=0.9))
    again.load_state_dict(lecam.state_dict())
    assert torch.equal(again(real, fake), lecam(real, fake))


@pytest.mark.parametrize(("length", "wanted"), [(1.0, 0.0), (2.0, 10.0)])
def test_a_linear_judge_of_length_one_is_not_pulled(length: float, wanted: float):
    pictures = torch.randn(5, 3, 4, 4).requires_grad_()
    judge = nn.Linear(48, 1)
    with torch.no_grad():
        judge.weight.mul_(length / judge.weight.norm())
    penalty = 10 * unit_gradient_penalty(judge(pictures.flatten(1)), pictures)
    assert penalty.item() == pytest.approx(wanted, abs=1e-6)
    penalty.backward()
    # d 10 (|w| - 1)^2 / dw = 20 (|w| - 1) w / |w|
    direction = judge.weight.detach() / length
    torch.testing.assert_close(judge.weight.grad, 20 * (length - 1) * direction, rtol=1e-4, atol=1e-5)


def test_a_judge_without_slope_has_finite_second_derivatives():
    pictures = torch.zeros(2, 3, 4, 4).requires_grad_()
    judge = nn.Linear(48, 1)
    nn.init.zeros_(judge.weight)
    penalty = unit_gradient_penalty(judge(pictures.flatten(1)), pictures)
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    penalty.backward()
    assert judge.weight.grad.isfinite().all()


def test_drift_is_the_square_of_the_mean():
    logits = torch.tensor([[1.0], [2.0]], requires_grad=True)
    term = drift(logits)
    assert term.item() == pytest.approx(2.25)
    term.backward()
    torch.testing.assert_close(logits.grad, torch.full((2, 1), 1.5))


def test_interpolates_lie_between():
    real, fake = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    found = interpolate(real, fake, torch.tensor([0.25, 1.0]))
    assert found.mean((1, 2, 3)).tolist() == [0.25, 1.0]
