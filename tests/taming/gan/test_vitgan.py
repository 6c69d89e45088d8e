"""ViTGAN: what the papers claim of its parts, shown; both patch heads; both ways in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.artifact import load_artifact, load_state, save_artifact
from taming.config import build_config
from taming.errors import ConfigError, UserError
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.vitgan import ViTGANDiscriminatorConfig
from taming.gan.generators import build_generator, build_trunk
from taming.gan.generators.mapping import MappingNetwork
from taming.gan.generators.patch_heads import ImplicitPatchHead
from taming.gan.generators.vitgan import ViTGANGeneratorConfig
from taming.gan.regularisers import gradient_penalty
from taming.layers.spectral_norm import spectral_norms
from taming.layers.token_attention import MultiHeadAttention

HEADS = ("implicit", "convolutional")


def generator_config(**options: Any) -> ViTGANGeneratorConfig:
    return ViTGANGeneratorConfig(
        **{"noise_dim": 5, "width": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 2, "style_dim": 6,
           "convolution_channels": 4, **options}
    )  # fmt: skip


def discriminator_config(**options: Any) -> ViTGANDiscriminatorConfig:
    return ViTGANDiscriminatorConfig(
        **{"width": 8, "num_heads": 2, "depth": 2, "mlp_ratio": 2, "patch_size": 8, **options}
    )


def discriminator(num_classes: int | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_discriminator(discriminator_config(**options), size=(16, 16), num_classes=num_classes)


# The generator


@pytest.mark.parametrize("head", HEADS)
def test_pictures_from_noise_and_classes(head: Any):
    torch.manual_seed(0)
    generator = build_generator(generator_config(head=head), size=(16, 8), channels=2, num_classes=3)
    z, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    images = generator(z, y)
    assert images.shape == (4, 2, 16, 8)
    assert generator.size == (16, 8)
    assert not torch.allclose(images, generator(z, (y + 1) % 3), atol=1e-3)
    assert not torch.allclose(images, generator(z.flip(0), y), atol=1e-3)
    images.square().sum().backward()
    assert [n for n, p in generator.named_parameters() if p.grad is None or not p.grad.any()] == []
    with pytest.raises(UserError, match="3 classes"):
        generator(z)


def test_noise_is_heard_through_the_style_alone():
    torch.manual_seed(0)
    generator = build_generator(generator_config(), size=(8, 8))
    first, second = (generator.stem(torch.randn(2, 5)) for _ in range(2))
    trunk = generator.trunk
    assert torch.equal(trunk(*first).images, trunk(second.features, first.style).images)
    assert not torch.allclose(trunk(*first).images, trunk(*second).images, atol=1e-3)
    # A mapping network looks at the direction of the noise, not at its length.
    z = torch.randn(2, 5)
    torch.testing.assert_close(generator(z), generator(3 * z), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_a_trunk_paints_latents_and_knows_the_gradient_at_its_last_layer(head: Any):
    torch.manual_seed(0)
    trunk = build_trunk(generator_config(head=head), start=(2, 4), size=(8, 16))
    assert trunk.in_channels == 8
    features = torch.randn(2, trunk.in_channels, 2, 4)
    images, seen = trunk(features)
    assert images.shape == (2, 3, 8, 16)
    assert not any(tensor.requires_grad for tensor in seen)
    torch.testing.assert_close(trunk.paint(*seen), images)
    gradient = torch.randn_like(images)
    (wanted,) = torch.autograd.grad(images, trunk.last_layer, gradient, retain_graph=True)
    torch.testing.assert_close(trunk.last_gradient(seen, gradient), wanted, rtol=1e-4, atol=1e-4)
    images.square().sum().backward()
    assert [n for n, p in trunk.named_parameters() if p.grad is None or not p.grad.any()] == []
    # Each latent is heard, and so is a style that is given.
    moved = features.clone()
    moved[:, :, 1, 3] += 1
    assert not torch.allclose(trunk(moved).images[:, :, 4:, 12:], images[:, :, 4:, 12:], atol=1e-3)
    assert not torch.allclose(trunk(features, torch.randn(2, 6)).images, images, atol=1e-3)
    with pytest.raises(UserError, match="16x16"):
        trunk.check_size(16, 16)


@pytest.mark.parametrize(
    ("head", "patch_size"), [("implicit", 4), ("convolutional", 4), ("convolutional", 16)]
)
def test_pictures_start_about_as_bright_as_pictures_are(head: Any, patch_size: int):
    torch.manual_seed(0)
    config = generator_config(head=head, patch_size=patch_size, width=32, style_dim=32, noise_dim=32)
    with torch.no_grad():
        deviation = float(build_generator(config, size=(32, 32))(torch.randn(8, 32)).std())
    assert 0.25 < deviation < 2


def test_which_head_paints_large_patches():
    trunk = build_trunk(generator_config(), start=(1, 1), size=(16, 16))
    assert type(trunk.head).__name__ == "ConvolutionalPatchHead"
    assert len(trunk.head.levels) == 5
    trunk = build_trunk(generator_config(), start=(2, 2), size=(16, 16))
    assert type(trunk.head).__name__ == "ImplicitPatchHead"


def test_between_the_pixels_the_implicit_function_is_as_interpolation_has_it():
    torch.manual_seed(0)
    head = ImplicitPatchHead(16, 3, (2, 2), 8, width=32)
    tokens = torch.randn(2, 4, 16)
    with torch.no_grad():
        coarse = head.paint(*head.draw_at(tokens, 8))
        fine = head.paint(*head.draw_at(tokens, 16))
    assert fine.shape == (2, 3, 32, 32)

    def patches(x: Tensor) -> Tensor:  # (B C 4, 1, P, P): functions end where patches end
        size = x.shape[-1] // 2
        return x.unfold(2, size, size).unfold(3, size, size).reshape(-1, 1, size, size)

    # Without the outermost pixels, which interpolation repeats where the function goes on.
    between = F.interpolate(patches(coarse), scale_factor=2, mode="bilinear")[..., 1:-1, 1:-1]
    error = (patches(fine)[..., 1:-1, 1:-1] - between).square().mean()
    assert error < 0.01 * (coarse - coarse.mean()).square().mean()


def test_demodulation_of_the_implicit_function_is_an_option():
    for demodulate in (True, False):
        trunk = build_trunk(generator_config(demodulate=demodulate), start=(2, 2), size=(8, 8))
        assert isinstance(trunk.head, ImplicitPatchHead)
        torch.nn.init.constant_(trunk.head.hidden.scale.bias, 9)  # weights ten times as long
        tokens = torch.zeros(1, 4, 8)
        hidden = trunk.head.draw_at(tokens, 4)[0]
        torch.nn.init.zeros_(trunk.head.hidden.scale.bias)
        same = torch.allclose(hidden, trunk.head.draw_at(tokens, 4)[0], rtol=1e-3)
        assert same == demodulate


def test_the_mapping_network_starts_with_styles_of_deviation_one():
    torch.manual_seed(0)
    for classes in (None, 4):
        mapping = MappingNetwork(64, 128, 3, classes)
        style = mapping(5 * torch.randn(64, 64), torch.arange(64) % 4)
        assert float(style.detach().square().mean()) == pytest.approx(1, abs=0.25)
        assert style.std(0).mean() > 0.5
    # The mean of latents may be near zero, and is left so.
    mapping = MappingNetwork(8, 6, 2, normalised=False)
    torch.testing.assert_close(mapping(1e-3 * torch.ones(1, 8)), 1e-3 * mapping(torch.ones(1, 8)))


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (18, 16), "patches of 4 pixels, which 18x16 is not divisible by"),
        ({"width": 9}, (16, 16), "width 9 is not divisible by num_heads 2"),
        ({"patch_size": 6, "head": "convolutional"}, (12, 12), "6 is not a power of two"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], size: tuple[int, int], message: str):
    with pytest.raises(ConfigError, match=message):
        build_generator(
            build_config(ViTGANGeneratorConfig, {**generator_config().model_dump(), **options}), size=size
        )


def test_a_trunk_wants_square_patches():
    with pytest.raises(ConfigError, match="a map of 2x4 does not divide pictures of 8x8 into square"):
        build_trunk(generator_config(), start=(2, 4), size=(8, 8))
    with pytest.raises(ConfigError, match="a patch of 6 is not a power of two"):
        build_trunk(generator_config(head="convolutional", patch_size=4), start=(2, 2), size=(12, 12))


# The discriminator


@pytest.mark.parametrize("linear", ["improved_spectral", "spectral", "plain", "equalised"])
@pytest.mark.parametrize("scores", ["l2_tied", "l2_kim", "dot"])
def test_logits_of_pictures_with_classes_and_without(scores: Any, linear: Any):
    network = discriminator(3, scores=scores, linear=linear)
    images, y = torch.randn(4, 3, 16, 16, requires_grad=True), torch.tensor([0, 1, 2, 0])
    logits = network(images, y)
    assert logits.shape == (4, 1)
    with sdpa_kernel(SDPBackend.MATH):
        gradient_penalty(network(images, y), images).backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in found.values())
    assert found["embedding.linear." + ("weight" if "spectral" not in linear else
                                        "parametrizations.weight.original")].any()  # fmt: skip
    network.zero_grad()
    network(images, y).sum().backward()
    unused = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []
    network.eval()
    assert not torch.allclose(network(images, y), network(images, (y + 1) % 3))
    alone = discriminator(scores=scores, linear=linear).eval()
    assert torch.equal(alone(images, y), alone(images))


def test_logits_of_patches():
    network = discriminator(3, head="tokens").eval()
    images, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    logits = network(images, y)
    assert logits.shape == (2, 1, 2, 2)
    assert not torch.allclose(network(images, 2 - y), logits)
    assert discriminator(head="tokens").eval()(images).shape == (2, 1, 2, 2)


def test_a_picture_that_patches_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="patches of 8 pixels, which 20x16 is not divisible by"):
        build_discriminator(discriminator_config(), size=(20, 16))


def jacobian_norms(scores: Any, scales: tuple[float, ...]) -> list[float]:
    """The largest 2-norm of the Jacobian at three inputs of each scale.

    Along the null space of one head's queries, which cannot tell such tokens apart; at random; and with one
    token of zero, which attends to all alike (the case by which Kim et al. 2021 show that dot products
    are not Lipschitz).
    """
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 4, scores=scores).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    unseen = torch.linalg.svd(layer.query.weight[:2]).Vh[-1]
    near, along = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    others = near.clone().index_fill_(0, torch.tensor([0]), 0)
    found = []
    for scale in scales:
        largest = 0.0
        for x in (near + scale * along * unseen, scale * near, scale * others):
            jacobian = torch.autograd.functional.jacobian(lambda t: layer(t[None])[0], x)
            largest = max(largest, float(torch.linalg.matrix_norm(jacobian.reshape(48, 48), 2)))
        found.append(largest)
    return found


def test_only_kims_attention_is_lipschitz():
    scales = (1.0, 10.0, 100.0, 1000.0)
    kim, tied, dot = (jacobian_norms(scores, scales) for scores in ("l2_kim", "l2_tied", "dot"))
    assert max(kim) < 10 * kim[0], kim
    assert tied[3] > 5 * tied[2] > 10 * tied[1], tied  # as the input does, in the end
    assert dot[3] > 50 * dot[2] > 2500 * dot[1], dot  # as its square


def test_every_weight_keeps_the_norm_that_it_started_with(tmp_path: Path):
    network = discriminator(3)
    norms = spectral_norms(network)
    starts = {name: float(part.initial) for name, part in norms.items()}
    # Patch embedding, query, value, proj, up and down of two blocks, the head's two.
    assert len(starts) == 1 + 2 * 5 + 2
    with torch.no_grad():
        for name in norms:
            network.get_parameter(name.removesuffix("0") + "original").mul_(5)
    images, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    for _ in range(100):
        network(images, y)
    config = discriminator_config()
    save_artifact(tmp_path / "saved", "discriminator", config, network.state_dict())
    _, state = load_artifact(tmp_path / "saved", "discriminator")
    torch.manual_seed(1)
    again = build_discriminator(config, size=(16, 16), num_classes=3)
    load_state(again, state, source="saved")
    for module in (network.eval(), again.eval()):
        for name, start in starts.items():
            owner, _, _ = name.rpartition(".parametrizations.")
            weight = module.get_submodule(owner).weight.detach()
            assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(start, rel=0.01), name
    assert torch.equal(network(images, y), again(images, y))
