"""The perceptual distance against the lpips package's own forward."""

from __future__ import annotations

import warnings

import lpips
import pytest
import torch

from taming.errors import UserError
from taming.metrics.lpips import PerceptualDistance


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    torch.manual_seed(0)
    return PerceptualDistance(random_weights=True)


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1
    return (target + 0.1 * torch.randn(2, 3, 32, 32, generator=generator)).requires_grad_(), target


def test_value_and_gradient_are_those_of_the_package(distance: PerceptualDistance):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    for index in range(5):
        getattr(package.net, f"slice{index + 1}").load_state_dict(distance.slices[index].state_dict())
    images, target = pictures()
    ours, theirs = distance(images, target), package(images, target).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(ours, images)
    (wanted,) = torch.autograd.grad(theirs, images)
    assert (gradient - wanted).norm() <= 1e-3 * wanted.norm()


def test_equal_pictures_are_at_no_distance_and_give_no_gradient(distance: PerceptualDistance):
    images, _ = pictures()
    found = distance(images, images.detach())
    assert found.item() == pytest.approx(0.0, abs=1e-9)
    (gradient,) = torch.autograd.grad(found, images)
    assert gradient.abs().max() < 1e-9


def test_black_pictures_give_finite_gradients(distance: PerceptualDistance):
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance(images, torch.ones(1, 3, 32, 32)), images)
    assert torch.isfinite(gradient).all()


def test_it_never_trains(distance: PerceptualDistance):
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert not any(p.requires_grad for p in distance.parameters())


def test_autocast_moves_the_gradient_little(distance: PerceptualDistance):
    images, target = pictures()
    (exact,) = torch.autograd.grad(distance(images, target), images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distance(images, target)
    (gradient,) = torch.autograd.grad(found, images)
    assert torch.cosine_similarity(gradient.flatten(), exact.flatten(), dim=0) > 0.97


def test_weights_that_cannot_be_read_are_named_with_both_ways_out(tmp_path):
    (tmp_path / "vgg.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"loss\.vgg_weights=PATH .*loss\.perceptual_weight=0"):
        PerceptualDistance(tmp_path / "vgg.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"features\.0\.weight"):
        PerceptualDistance(tmp_path / "other.pth")


def test_weights_that_cannot_be_had_are_named_with_both_ways_out(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(UserError, match=r"VGG16 weights.*no network.*loss\.perceptual_weight=0"):
        PerceptualDistance()
