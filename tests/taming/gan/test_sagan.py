"""SAGAN: classes, blocks against their definition, spectral norms, trunks for stage one, sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.config import build_config
from taming.errors import ConfigError, UserError
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.sagan import ResidualDown, SAGANDiscriminator, SAGANDiscriminatorConfig
from taming.gan.generator import Generator
from taming.gan.generators import build_generator, build_trunk
from taming.gan.generators.sagan import ResidualUp, SAGANGeneratorConfig, SAGANTrunk
from taming.layers.spectral_norm import spectral_norms

CLASSES = 3


def make_generator(num_classes: int | None = CLASSES, size: int = 16, **values: Any) -> Generator:
    torch.manual_seed(0)
    config = build_config(SAGANGeneratorConfig, {"channels": 4, "noise_dim": 6, **values})
    return build_generator(config, size=(size, size), num_classes=num_classes)


def make_discriminator(
    num_classes: int | None = CLASSES, size: int = 16, **values: Any
) -> SAGANDiscriminator:
    torch.manual_seed(0)
    config = build_config(SAGANDiscriminatorConfig, {"channels": 4, **values})
    network = build_discriminator(config, size=(size, size), num_classes=num_classes)
    assert isinstance(network, SAGANDiscriminator)
    return network


def labels(*classes: int) -> Tensor:
    return torch.tensor(classes)


def scatter(network: nn.Module) -> None:
    """Tables of classes and gammas away from where they begin."""
    for name, parameter in network.named_parameters():
        if name.endswith(("gamma", "beta")):
            nn.init.normal_(parameter)


def test_another_class_is_another_picture():
    network = make_generator()
    scatter(network)
    network.eval()
    z = torch.randn(2, 6)
    first = network(z, labels(0, 1))
    assert first.shape == (2, 3, 16, 16)
    assert first.abs().max() <= 1
    second = network(z, labels(2, 1))
    assert (first[0] - second[0]).abs().max() > 1e-2
    assert torch.equal(first[1], second[1])  # in eval mode pictures do not see each other
    with pytest.raises(UserError, match="classes"):
        network(z)
    alone = make_generator(None).eval()
    assert torch.equal(alone(z), alone(z, labels(0, 2)))


@pytest.mark.parametrize("head", ["projection", "map"])
def test_another_class_is_another_verdict(head: str):
    images = torch.randn(2, 3, 16, 16)
    network = make_discriminator(head=head).eval()
    first, second = network(images, labels(0, 1)), network(images, labels(2, 1))
    assert first.shape == ((2, 1) if head == "projection" else (2, 1, 4, 4))
    assert (first[0] - second[0]).abs().max() > 1e-3
    assert torch.equal(first[1], second[1])
    alone = make_discriminator(None, head=head).eval()
    assert torch.equal(alone(images), alone(images, labels(0, 2)))


def test_projection_is_linear_plus_inner_product_of_sums():
    network = make_discriminator().eval()
    images, y = torch.randn(2, 3, 16, 16), labels(2, 0)
    h = network.blocks[0](images)
    h = network.attention["0"](h)
    h = network.blocks[2](network.blocks[1](h)).clamp(min=0).sum((2, 3))
    head = network.head
    wanted = head.linear(h)[:, 0] + (h * head.embed.weight[y]).sum(1)
    torch.testing.assert_close(network(images, y)[:, 0], wanted)


def test_up_block_is_its_definition():
    torch.manual_seed(0)
    block = ResidualUp(4, 6, CLASSES)
    scatter(block)
    block.eval()
    x = torch.randn(2, 4, 3, 5)
    style = F.one_hot(labels(1, 2), CLASSES).float()

    def normed(norm: nn.Module, h: Tensor) -> Tensor:  # running statistics are 0 and 1 at the start
        gamma, beta = (table[labels(1, 2)][:, :, None, None] for table in (norm.gamma, norm.beta))
        return gamma * h / (1 + 1e-5) ** 0.5 + beta

    def doubled(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = block.conv1(doubled(normed(block.norm1, x).clamp(min=0)))
    h = block.conv2(normed(block.norm2, h).clamp(min=0))
    torch.testing.assert_close(block(x, style), h + block.shortcut(doubled(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "halve", "first"), [(3, True, True), (3, True, False), (6, False, False)])
def test_down_block_is_its_definition_and_leaves_its_input(width: int, halve: bool, first: bool):
    """A ReLU in place before the shortcut leaves would show in both."""
    torch.manual_seed(0)
    block = ResidualDown(width, 6, halve=halve, first=first).eval()
    x = torch.randn(2, width, 6, 4)
    before = x.clone()
    found = block(x)
    assert torch.equal(x, before)
    h = block.conv2(block.conv1(before if first else before.clamp(min=0)).clamp(min=0))
    skip = before if not halve else block.shortcut(before)
    wanted = h + skip
    if halve:
        wanted = wanted.unflatten(2, (3, 2)).unflatten(4, (2, 2)).mean((3, 5))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_layer_is_of_spectral_norm_one_and_rests_in_eval():
    generator, network = make_generator(size=8), make_discriminator(size=8)
    z, y = torch.randn(2, 6), labels(0, 1)
    for model in (generator, network):
        for name, parameter in model.named_parameters():
            if name.endswith("original"):
                parameter.mul_(3).add_(0.3 * torch.randn_like(parameter))  # vectors know nothing of this
    for _ in range(100):
        network(generator(z, y), y)
    generator.eval(), network.eval()
    for model in (generator, network):
        norms = spectral_norms(model)
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]
        assert len(norms) == len(layers)  # all of them
        for layer in layers:
            assert 0.98 < torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.02
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model(z, y) if model is generator else model(torch.randn(2, 3, 8, 8), y)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_reach_every_parameter():
    generator, network = make_generator(), make_discriminator()
    scatter(generator), scatter(network)
    y = labels(0, 1, 2, 0)
    network(generator(torch.randn(4, 6), y), y).mean().backward()
    for name, parameter in [*generator.named_parameters(), *network.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("conv1.bias"), name  # a norm takes it out


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_trunk_for_stage_one(norm: str):
    torch.manual_seed(0)
    config = build_config(SAGANGeneratorConfig, {"channels": 2, "norm": norm})
    trunk = build_trunk(config, start=(16, 16), size=(64, 64))
    assert isinstance(trunk, SAGANTrunk)
    assert trunk.in_channels == 8  # what the whole generator of 64 px has at 16: 4 units
    assert list(trunk.attention) == ["1"]  # at 32 cells
    painted = trunk(torch.randn(2, 8, 16, 16))
    assert painted.images.shape == (2, 3, 64, 64)
    # The last layer's gradient, from its features alone, is that of the whole graph.
    gradient = torch.randn_like(painted.images)
    (wanted,) = torch.autograd.grad(painted.images, trunk.last_layer, gradient)
    torch.testing.assert_close(trunk.last_gradient(painted.features, gradient), wanted, rtol=1e-4, atol=1e-3)
    # Larger pictures pass.
    trunk.check_size(96, 64)
    assert trunk(torch.randn(1, 8, 24, 16)).images.shape == (1, 3, 96, 64)
    with pytest.raises(UserError, match="multiple of 4"):
        trunk.check_size(66, 64)
    with pytest.raises(ConfigError, match="power of two"):
        build_trunk(config, start=(8, 8), size=(24, 24))


def test_trunk_that_begins_above_the_published_place_looks_at_its_start():
    config = SAGANGeneratorConfig(channels=1)
    assert list(build_trunk(config, start=(64, 64), size=(256, 256)).attention) == ["0"]
    assert list(build_trunk(config, start=(128, 128), size=(256, 256)).attention) == []


@pytest.mark.parametrize(
    ("size", "generated", "judged"),
    [
        (32, [256, 256, 256, 256], [128, 128, 128, 128]),
        (64, [1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024]),
        (128, [1024, 1024, 512, 256, 128, 64], [64, 128, 256, 512, 1024, 1024]),
        (256, [1024, 1024, 512, 512, 256, 128, 64], [64, 128, 256, 512, 512, 1024, 1024]),
    ],
)
def test_published_widths_and_place_of_attention(size: int, generated: list[int], judged: list[int]):
    generator, network = SAGANGeneratorConfig(), SAGANDiscriminatorConfig()
    assert generator.widths(size, size) == generated
    assert [64 * multiplier for multiplier in network.blocks(size, size)[0]] == judged
    side = 16 if size == 32 else 32
    maps = [4 * 2**n for n in range(len(generated))]
    assert [maps[n] for n in generator.attention.places(maps, size)] == [side]
    maps = network.maps(size, size)
    assert maps[-1] == (8 if size == 32 else 4)
    assert [maps[n] for n in network.attention.places(maps, size)] == [side]


def test_what_cannot_be_is_said():
    config = SAGANGeneratorConfig()
    for size in ((6, 6), (33, 32), (512, 512)):
        with pytest.raises(ConfigError, match="divisible by 8, or give multipliers"):
            build_generator(config, size=size)
    for values, words in (
        ({"multipliers": [2, 2, 2, 2, 2]}, "not divisible by 16"),
        ({"multipliers": [2]}, "two or more"),
        ({"attention": {"resolutions": [20]}}, r"\[20\] are no maps"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_generator(build_config(SAGANGeneratorConfig, values), size=(24, 24))
    for values, words in (
        ({"multipliers": []}, "one or more"),
        ({"num_halvings": 5}, "no more halvings"),
        ({"multipliers": [1] * 6}, "halved 5 times"),
        ({"attention": {"resolutions": [20]}}, r"\[20\] are no maps"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_discriminator(build_config(SAGANDiscriminatorConfig, values), size=(16, 16))
