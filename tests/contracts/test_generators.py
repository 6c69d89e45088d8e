"""Every generator, and every discriminator of its family: what the training and stage one count on."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from taming.building import build_with
from taming.config import Config, build_config
from taming.errors import ConfigError, UserError
from taming.gan.discriminators import DiscriminatorConfig, build_discriminator
from taming.gan.generator import Generator
from taming.gan.generators import GeneratorConfig, build_generator, build_trunk

SIZE = (16, 16)
Module = TypeVar("Module", bound=nn.Module)
GENERATORS: dict[str, dict[str, Any]] = {
    "sagan": {"kind": "sagan", "channels": 4, "noise_dim": 6, "multipliers": [2, 2, 1]},
    "transgan": {
        "kind": "transgan", "noise_dim": 6, "widths": [64, 16, 4], "depths": [1, 1, 1], "num_heads": 2,
    },
    "vitgan": {"kind": "vitgan", "noise_dim": 6, "width": 8, "num_heads": 2, "depth": 1, "style_dim": 6},
    "vitgan-convolutional": {
        "kind": "vitgan", "noise_dim": 6, "width": 8, "num_heads": 2, "depth": 1, "style_dim": 6,
        "head": "convolutional", "convolution_channels": 4,
    },
    "stransgan": {
        "kind": "stransgan", "noise_dim": 6, "widths": [8, 8, 8], "depths": [1, 1, 2], "num_heads": 2,
        "window": 4, "windowed_from": 16, "class_dim": 4,
    },
}  # fmt: skip
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "sagan": {"kind": "sagan", "channels": 4, "multipliers": [1, 2], "num_halvings": 2},
    "sagan-map": {"kind": "sagan", "channels": 4, "multipliers": [1, 2], "num_halvings": 2, "head": "map"},
    "transgan": {"kind": "transgan", "patch_widths": [8, 4], "depths": [1, 1], "num_heads": 2},
    "transgan-tokens": {
        "kind": "transgan", "patch_widths": [8, 4], "depths": [1, 1], "num_heads": 2, "head": "tokens",
    },
    "vitgan": {"kind": "vitgan", "width": 8, "num_heads": 2, "depth": 1, "scores": "l2_kim"},
    "vitgan-tokens": {"kind": "vitgan", "width": 8, "num_heads": 2, "depth": 1, "head": "tokens"},
    "stransgan": {
        "kind": "stransgan", "stem_halvings": 1, "widths": [8, 8], "depths": [1, 1], "num_heads": 2,
        "window": 4, "head_dim": 8,
    },
    "stransgan-tokens": {
        "kind": "stransgan", "stem_halvings": 1, "widths": [8, 8], "depths": [1, 1], "num_heads": 2,
        "window": 4, "head": "tokens",
    },
}  # fmt: skip


class Painting(Config):
    network: GeneratorConfig


class Judging(Config):
    network: DiscriminatorConfig


def generator(name: str, num_classes: int | None = None) -> Generator:
    torch.manual_seed(0)
    config = build_config(Painting, {"network": GENERATORS[name]}).network
    return awake(build_generator(config, size=SIZE, num_classes=num_classes))


def discriminator(name: str, num_classes: int | None = None) -> nn.Module:
    torch.manual_seed(0)
    config = build_config(Judging, {"network": DISCRIMINATORS[name]}).network
    return awake(build_discriminator(config, size=SIZE, num_classes=num_classes))


def awake(network: Module) -> Module:
    """With all that starts at zero, or says nothing of the class at first, moved a little."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def without_gradient(network: nn.Module) -> list[str]:
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("name", GENERATORS)
def test_pictures_follow_noise_and_class_alone(name: str):
    network = generator(name, num_classes=3)
    z, y = torch.randn(4, network.noise_dim), torch.tensor([0, 1, 2, 1])
    for _ in range(3):
        network(z, y)  # running statistics and power iterations
    network.eval()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    images = network(z, y)
    assert images.shape == (4, 3, *SIZE)
    torch.testing.assert_close(network(z[2:3], y[2:3]), images[2:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(z, (y + 1) % 3), images, atol=1e-4)
    assert not torch.allclose(network(z.flip(0), y), images, atol=1e-4)
    assert all(torch.equal(state[key], value) for key, value in network.state_dict().items())
    with pytest.raises(UserError, match="3 classes: give one for each picture"):
        network(z)
    plain = generator(name).eval()
    assert torch.equal(plain(z, y), plain(z))


@pytest.mark.parametrize("name", GENERATORS)
def test_everything_in_a_generator_learns_and_is_saved(name: str):
    network = generator(name, num_classes=3)
    z, y = torch.randn(6, network.noise_dim), torch.arange(6) % 3
    painted = network.painted(z, y)
    wanted = torch.randn_like(painted.images)
    (painted.images * wanted).sum().backward()
    assert without_gradient(network) == []
    found = network.trunk.last_gradient(painted.features, wanted)
    torch.testing.assert_close(found, network.trunk.last_layer.grad, rtol=1e-4, atol=1e-4)
    assert any(network.trunk.last_layer is p for p in network.parameters())
    config = build_config(Painting, {"network": GENERATORS[name]}).network
    again = build_with(
        lambda: build_generator(config, size=SIZE, num_classes=3), network.state_dict(), source="x"
    )
    torch.testing.assert_close(again.eval()(z, y), network.eval()(z, y))


@pytest.mark.parametrize("name", GENERATORS)
def test_its_trunk_paints_latents(name: str):
    torch.manual_seed(0)
    config = build_config(Painting, {"network": GENERATORS[name]}).network
    start = (8, 8) if name == "transgan" else (4, 4)
    trunk = awake(build_trunk(config, start=start, size=SIZE, channels=2))
    features = torch.randn(2, trunk.in_channels, *start, requires_grad=True)
    painted = trunk(features)
    assert painted.images.shape == (2, 2, *SIZE)
    painted.images.square().sum().backward()
    assert features.grad is not None
    assert (features.grad.flatten(2).abs().sum((0, 1)) > 0).all()  # every cell reaches the picture
    assert without_gradient(trunk) == []
    with pytest.raises(UserError, match=r"paints|doubles"):
        trunk.check_size(18, 18)
    with pytest.raises(ConfigError):
        build_trunk(config, start=(3, 3), size=SIZE)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_discriminator_judges_pictures_and_their_classes(name: str):
    pictures, y = torch.randn(4, 3, *SIZE, requires_grad=True), torch.tensor([0, 1, 2, 1])
    plain = discriminator(name).eval()
    logits = plain(pictures, y)
    assert logits.shape[:2] == (4, 1)
    assert (logits.ndim == 4) == (name.endswith(("map", "tokens")))
    assert torch.equal(logits, plain(pictures))
    logits.sum().backward()
    assert (pictures.grad.abs().sum((0, 1)) > 0).all()  # every pixel is looked at
    if name == "transgan-tokens":  # it says so, rather than leave the classes out
        with pytest.raises(ConfigError, match="class"):
            discriminator(name, num_classes=3)
        return
    conditional = discriminator(name, num_classes=3).eval()
    assert not torch.allclose(conditional(pictures, y), conditional(pictures, (y + 1) % 3), atol=1e-5)
    conditional.train()(pictures, y).square().mean().backward()
    assert without_gradient(conditional) == []
