"""DiffAugment: what each operation does at known draws, and that gradients pass through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taming.gan.augment import AugmentConfig, View, draw_view

ALL = ("color", "translation", "cutout")
EVERY = ("color", "scaling", "translation", "cutout")


def pictures(batch: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def view(policy: tuple[str, ...], draws: list[float]) -> View:
    return View(AugmentConfig(policy=policy), torch.tensor([draws]))


def test_nothing_is_the_identity_and_draws_nothing():
    images, before = pictures(), torch.get_rng_state()
    assert draw_view(AugmentConfig(), images)(images) is images
    assert torch.equal(before, torch.get_rng_state())


def test_color_at_known_draws():
    images = pictures(1)
    still = view(("color",), [0.5, 0.5, 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(still(images), images)
    brighter = view(("color",), [0.9, 0.5, 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(brighter(images), images + 0.4)
    grey = view(("color",), [0.5, 0.0, 0.5, 0, 0, 0, 0])(images)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images))
    flat = view(("color",), [0.5, 0.5, 0.0, 0, 0, 0, 0])(images)
    torch.testing.assert_close(flat - flat.mean(), 0.5 * (images - images.mean()))


def test_translation_moves_whole_pixels_and_fills_with_zeros():
    images = pictures(1)
    none = view(("translation",), [0, 0, 0, 0.5, 0.5, 0, 0])
    assert torch.equal(none(images), images)
    least = view(("translation",), [0, 0, 0, 0.0, 0.0, 0, 0])(images)  # -2 of 16 rows, -3 of 24 columns
    assert torch.equal(least[..., 2:, 3:], images[..., :-2, :-3])
    assert least[..., :2, :].abs().sum() == 0
    assert least[..., :, :3].abs().sum() == 0
    most = view(("translation",), [0, 0, 0, 0.999, 0.999, 0, 0])(images)
    assert torch.equal(most[..., :-2, :-3], images[..., 2:, 3:])


def test_cutout_is_half_of_each_side():
    images = torch.ones(1, 3, 16, 24)
    found = view(("cutout",), [0, 0, 0, 0, 0, 0.5, 0.5])(images)
    assert (found == 0).sum() == 3 * 8 * 12
    assert (found[0, 0] == 0).nonzero().amin(0).tolist() == [4, 6]
    edge = view(("cutout",), [0, 0, 0, 0, 0, 0.0, 0.0])(images)
    assert (edge[0, 0] == 0).nonzero().amax(0).tolist() == [3, 5]


@pytest.mark.parametrize("policy", [(name,) for name in EVERY] + [ALL])
def test_one_view_is_one_augmentation_and_gradients_pass(policy: tuple[str, ...]):
    torch.manual_seed(0)
    images = pictures().double()
    look = draw_view(AugmentConfig(policy=policy), images)
    assert torch.equal(look(images), look(images.clone()))
    assert not torch.equal(draw_view(AugmentConfig(policy=policy), images, step=1)(images), look(images))
    rest = draw_view(AugmentConfig(policy=policy), images[1:], first=1, in_all=3)
    assert torch.equal(rest.draws, look.draws[1:])
    assert look(images).shape == images.shape
    leaf = images[:, :, :6, :6].clone().requires_grad_()
    assert torch.autograd.gradcheck(look, leaf)
    # Every picture has draws of its own.
    same = images[:1].expand(3, -1, -1, -1)
    assert not torch.equal(look(same)[0], look(same)[1])


def test_what_was_cut_out_has_no_gradient():
    leaf = torch.ones(1, 3, 16, 16, requires_grad=True)
    look = view(("cutout",), [0, 0, 0, 0, 0, 0.5, 0.5])
    (gradient,) = torch.autograd.grad(look(leaf).sum(), leaf)
    assert torch.equal(gradient == 0, look(leaf) == 0)


def test_the_same_seed_gives_the_same_view():
    images = pictures()
    torch.manual_seed(5)
    first = draw_view(AugmentConfig(policy=ALL), images)(images)
    torch.manual_seed(5)
    assert torch.equal(draw_view(AugmentConfig(policy=ALL), images)(images), first)


def test_a_list_of_names_means_what_it_meant():
    """Runs that were started before there were settings go on with the same draws, to the last bit."""
    config = AugmentConfig.model_validate(["cutout", "color"])
    assert config == AugmentConfig(policy=("cutout", "color"))
    assert AugmentConfig.model_validate(config.model_dump(mode="json")) == config
    draws = draw_view(config, pictures(2), seed=3, step=5).draws
    wanted = [0.6300036907196045, 0.08910059928894043, 0.4337066411972046, 0.33189183473587036]
    assert draws[0, :4].tolist() == wanted
    assert draws[1, 6].item() == 0.09952014684677124
    rest = draw_view(config, pictures(5), seed=3, step=5, first=2, in_all=9).draws
    assert rest[0, 0].item() == 0.9470740556716919


def test_shares_and_streams():
    images = pictures(1).expand(400, -1, -1, -1)
    config = AugmentConfig(policy=ALL, probability=0.5, cutout_probability=0.5, translation=0.0)
    found = draw_view(config, images)(images)
    cut = (found == 0).all(1).flatten(1).any(1)
    coloured = ~torch.isclose(found, images).flatten(1).any(1)
    assert cut.float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert coloured.float().mean().item() == pytest.approx(0.5, abs=0.08)
    never = AugmentConfig(policy=EVERY, probability=0)
    assert torch.equal(draw_view(never, images)(images), images)
    other = draw_view(config, images, stream=1).draws
    assert not torch.isclose(other, draw_view(config, images).draws).any()


def test_scaling_at_known_draws():
    ramp = torch.linspace(-1, 1, 9).expand(1, 1, 9, 9)
    config = AugmentConfig(policy=("scaling",), scaling=2)

    def scaled(draw: float) -> Tensor:
        return View(config, torch.zeros(1, 7), torch.tensor([[draw, 0, 0, 0, 0]]))(ramp)

    torch.testing.assert_close(scaled(0.5), ramp)
    torch.testing.assert_close(scaled(1.0), (ramp / 2), rtol=0, atol=1e-6)  # a ramp is half as steep
    half = scaled(0.0)
    assert half[0, 0, :2].abs().sum() == 0  # smaller: zeros come in
    torch.testing.assert_close(half[0, 0, 4, 2:7], ramp[0, 0, 4, ::2])
