"""STransGAN: where the class enters, projected shortcuts, windows, the equalised learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming.config import build_config
from taming.errors import ConfigError, UserError
from taming.gan.discriminators.stransgan import (
    Stage,
    STransGANDiscriminator,
    STransGANDiscriminatorConfig,
)
from taming.gan.generators import build_generator, build_trunk
from taming.gan.generators.stransgan import STransGANGeneratorConfig, make_block
from taming.gan.losses import discriminator_loss
from taming.gan.probes import attention_distance, norm_ratios, record_attention
from taming.layers.equalised import EqualisedConv2d, EqualisedLinear
from taming.layers.modulation import TokenAdaIN

GENERATOR: dict[str, Any] = {
    "noise_dim": 6, "widths": (16, 16, 8), "depths": (1, 1, 2), "num_heads": 2, "window": 4,
    "windowed_from": 8, "class_dim": 4,
}  # fmt: skip
DISCRIMINATOR: dict[str, Any] = {
    "stem_halvings": 1, "widths": (8, 16), "depths": (2, 1), "num_heads": 2, "window": 4, "head_dim": 16,
}  # fmt: skip


def generator_config(**changes: Any) -> STransGANGeneratorConfig:
    return STransGANGeneratorConfig(**(GENERATOR | changes))


def discriminator(size: int = 16, num_classes: int | None = None, **changes: Any) -> STransGANDiscriminator:
    torch.manual_seed(0)
    config = STransGANDiscriminatorConfig(**(DISCRIMINATOR | changes))
    return STransGANDiscriminator(config, 3, (size, size), num_classes)


def class_sensitivity(place: str, scale: float) -> float:
    """How much of what a block says depends on the style, where the trunk is `scale` times as large."""
    torch.manual_seed(0)
    block = make_block(generator_config(class_place=place), 16, 8, window=None, shift=0)
    nn.init.normal_(norm_of_style(block).linear.weight)
    x, one, other = torch.randn(2, 16, 16), torch.randn(2, 8), torch.randn(2, 8)
    with torch.no_grad():
        first, second = block(scale * x, one), block(scale * x, other)
    return float((first - second).norm() / first.norm())


def norm_of_style(block: nn.Module) -> TokenAdaIN:
    return next(part for part in block.modules() if isinstance(part, TokenAdaIN))


def test_a_large_shortcut_hides_the_class_in_the_branches_and_not_on_the_trunk():
    assert class_sensitivity("trunk", 100) > 0.7 * class_sensitivity("trunk", 1) > 0.1
    for place in ("branches", "after_attention"):
        assert class_sensitivity(place, 1) > 0.01
        assert class_sensitivity(place, 100) < 0.05 * class_sensitivity(place, 1), place


def test_blocks_are_what_they_are_said_to_be():
    x, style = torch.randn(2, 16, 16), torch.randn(2, 8)

    def block(place: str | None) -> Any:
        torch.manual_seed(1)
        config = generator_config() if place is None else generator_config(class_place=place)
        return make_block(config, 16, None if place is None else 8, window=None, shift=0)

    plain = block(None)
    half = x + plain.attention(plain.norm1(x))
    torch.testing.assert_close(plain(x), half + plain.mlp(plain.norm2(half)))
    inside = block("branches")
    half = x + inside.attention(inside.norm1(x, style))
    torch.testing.assert_close(inside(x, style), half + inside.mlp(inside.norm2(half, style)))
    assert isinstance(inside.norm1, TokenAdaIN)
    assert isinstance(inside.norm2, TokenAdaIN)
    trunk = block("trunk")
    half = trunk.trunk_norm(x + trunk.attention(trunk.norm1(x)), style)
    torch.testing.assert_close(trunk(x, style), half + trunk.mlp(half))
    after = block("after_attention")
    half = x + after.attention_norm(after.attention(after.norm1(x)), style)
    torch.testing.assert_close(after(x, style), half + after.mlp(after.norm2(half)))


def test_adain_leaves_of_a_channel_what_the_style_says():
    norm = TokenAdaIN(5, 3)
    nn.init.normal_(norm.linear.weight)
    x, style = 7 + 30 * torch.randn(2, 40, 5), torch.randn(2, 3)
    gamma, beta = norm.linear(style).chunk(2, -1)
    out = norm(x, style)
    torch.testing.assert_close(out.mean(1), beta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.std(1, correction=0), (1 + gamma).abs(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm(100 * x, style), out, rtol=1e-3, atol=1e-3)


def test_adain_refuses_a_single_token():
    with pytest.raises(ValueError, match="single"):
        TokenAdaIN(5, 3)(torch.randn(2, 1, 5), torch.randn(2, 3))


@pytest.mark.parametrize("norm", ["adain", "layer"])
@pytest.mark.parametrize("place", ["branches", "trunk", "after_attention"])
def test_noise_and_class_change_the_picture(place: str, norm: str):
    torch.manual_seed(0)
    config = generator_config(class_place=place, class_norm=norm)
    model = build_generator(config, size=(16, 16), num_classes=3)
    z = torch.randn(1, 6).expand(3, 6)
    with torch.no_grad():
        pictures = model(z, torch.arange(3))
        other = model(torch.randn(3, 6), torch.arange(3))
    assert pictures.shape == (3, 3, 16, 16)
    assert (pictures[0] - pictures[1]).abs().max() > 1e-4
    assert (pictures[:1] - other[:1]).abs().max() > 0.05
    assert 0.2 < pictures.std() < 1.0


def test_a_trunk_enters_at_the_stage_of_its_map():
    config = generator_config(widths=(32, 24, 16, 8), depths=(1, 1, 1, 1))
    for cells, width in ((4, 32), (8, 24), (16, 16)):
        trunk = build_trunk(config, start=(cells, cells), size=(32, 32))
        assert trunk.in_channels == width
        painted = trunk(torch.randn(1, width, cells, cells))
        assert painted.images.shape == (1, 3, 32, 32)
        assert len(trunk.stages) == int(math.log2(32 // cells)) + 1


def test_a_trunk_paints_other_sizes():
    trunk = build_trunk(generator_config(), start=(4, 4), size=(16, 16))
    trunk.check_size(32, 48)
    assert trunk(torch.randn(1, 16, 8, 12)).images.shape == (1, 3, 32, 48)
    with pytest.raises(UserError, match="8 divides"):
        trunk.check_size(32, 44)


def test_positions_start_at_nothing_and_learn_at_a_tenth_of_the_rate():
    stage = build_trunk(generator_config(), start=(4, 4), size=(16, 16)).stages[2]
    stage.blocks = nn.ModuleList()
    optimizer = torch.optim.Adam(stage.parameters(), lr=1e-3, betas=(0.0, 0.99))
    maps = torch.zeros(1, 256, 8)
    assert not stage(maps, None, (16, 16)).any()
    (stage(maps, None, (16, 16)) - torch.rand(1, 256, 8)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(stage(maps, None, (16, 16)), torch.full((1, 256, 8), 1e-4), rtol=1e-3, atol=0)


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="3 stages, up to 16"):
        build_generator(generator_config(), size=(32, 32))
    with pytest.raises(ConfigError, match="doubles"):
        build_generator(generator_config(), size=(16, 24))
    with pytest.raises(ConfigError, match="halves pictures 2 times"):
        build_discriminator_of(6)
    with pytest.raises(ConfigError, match="6x6 tokens"):
        build_discriminator_of(24, stem_halvings=2, widths=(8,), depths=(1,))
    for section, words in (
        ({"widths": (8, 8), "depths": (1,)}, "2 widths and 1 depths"),
        ({"widths": (9,), "depths": (1,)}, "multiple of num_heads"),
        ({"widths": (8,), "depths": (0,)}, "at least one block"),
    ):
        for schema in (STransGANGeneratorConfig, STransGANDiscriminatorConfig):
            with pytest.raises(ConfigError, match=words):
                build_config(schema, section)


def build_discriminator_of(size: int, **changes: Any) -> nn.Module:
    from taming.gan.discriminators import build_discriminator

    config = STransGANDiscriminatorConfig(**(DISCRIMINATOR | changes))
    return build_discriminator(config, size=(size, size))


def test_projections_that_are_the_identity_make_the_residual_network():
    projected, plain = discriminator(), discriminator(skip="identity")
    state = projected.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    pictures = torch.randn(4, 3, 16, 16)
    blocks = [block for stage in projected.stages for block in stage.blocks]
    starts = [skip.effective_weight for block in blocks for skip in (block.skip1, block.skip2)]
    for weight in starts:
        torch.testing.assert_close(weight, math.sqrt(0.5) * torch.eye(len(weight)))
    assert not torch.allclose(projected(pictures), plain(pictures))
    with torch.no_grad():
        for skip in (skip for block in blocks for skip in (block.skip1, block.skip2)):
            skip.weight.mul_(math.sqrt(2))
    torch.testing.assert_close(projected(pictures), plain(pictures), rtol=1e-4, atol=1e-4)


def test_all_that_learns_in_the_blocks_is_equalised():
    torch.manual_seed(0)
    stage = Stage(STransGANDiscriminatorConfig(num_heads=2), 64, 1)
    layers = [part for part in stage.modules() if isinstance(part, nn.Linear | EqualisedLinear)]
    assert len(layers) == 4 + 2 + 2
    assert all(isinstance(layer, EqualisedLinear) for layer in layers)
    optimizer = torch.optim.Adam(stage.parameters(), lr=2e-3, betas=(0.0, 0.99))
    block = stage.blocks[0]
    up: EqualisedLinear = block.mlp.up
    normed = block.norm2(torch.randn(4, 256, 64))
    assert float(up(normed).detach().std()) == pytest.approx(1, abs=0.1)
    before = up.effective_weight.detach().clone()
    stage(torch.randn(2, 64, 8, 8)).square().sum().backward()
    optimizer.step()
    moved = (up.effective_weight - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2e-3 / math.sqrt(64)), rtol=2e-2, atol=0)


def test_deviations_stay_about_one_through_the_discriminator():
    """As equalised weights, and projections over the root of two, are there for."""
    network = discriminator(32, widths=(32, 64), depths=(4, 4), num_heads=4)
    deviations: list[float] = []
    for part in network.modules():
        if isinstance(part, Stage | EqualisedConv2d):
            part.register_forward_hook(lambda _, args, out: deviations.append(float(out.detach().std())))
    network(torch.randn(4, 3, 32, 32))
    assert len(deviations) == 5
    assert all(0.4 < deviation < 2 for deviation in deviations), deviations


def test_windows_hold_attention_within_their_diameter():
    network = discriminator(32)
    grid = (16, 16)
    stage = network.stages[0]
    found = record_attention(stage, lambda: stage(torch.randn(2, 8, *grid)))
    assert len(found) == 2
    diameter = 3 * math.sqrt(2)
    for probabilities in found.values():
        assert probabilities.shape == (2 * 16, 2, 16, 16)
        assert attention_distance(probabilities, (4, 4)).max() <= diameter
    everywhere = make_block(generator_config(), 8, None, window=None, shift=0)
    (whole,) = record_attention(everywhere, lambda: everywhere(torch.randn(2, 256, 8), grid=grid)).values()
    assert attention_distance(whole, grid).min() > diameter
    # In the picture too: a shifted window that holds both of its ends must not mix them.
    shifted = stage.blocks[1].attention
    assert shifted.shift == 2
    assert reach(shifted, grid) <= diameter
    assert reach(everywhere.attention, grid) > diameter


def reach(attention: nn.Module, grid: tuple[int, int]) -> float:
    """The largest distance in cells between an output and an input that it depends on."""
    x = torch.randn(1, grid[0] * grid[1], 8, requires_grad=True)
    out = attention(x, grid=grid)
    farthest = 0.0
    for cell in (0, 6, 34, grid[0] * grid[1] - 1):
        (gradient,) = torch.autograd.grad(out[0, cell].sum(), x, retain_graph=True)
        for other in gradient[0].abs().sum(-1).nonzero().flatten().tolist():
            rows, columns = cell // grid[1] - other // grid[1], cell % grid[1] - other % grid[1]
            farthest = max(farthest, math.hypot(rows, columns))
    return farthest


def test_maps_within_a_window_are_not_shifted_and_other_sizes_pass():
    network = discriminator(16, head="tokens", depths=(2, 2))
    same = discriminator(16, head="tokens", depths=(2, 2))
    for stage in same.stages:
        for block in stage.blocks:
            block.attention.shift = 0
    for size, alike in ((8, True), (16, False), (32, False)):
        pictures = torch.randn(4, 3, size, size)
        logits = network(pictures)
        assert logits.shape == (4, 1, size // 4, size // 4)
        assert torch.allclose(logits, same(pictures)) == alike, size


@pytest.mark.parametrize("head", ["picture", "tokens"])
def test_a_class_changes_the_verdict(head: str):
    network, pictures = discriminator(num_classes=3, head=head), torch.randn(4, 3, 16, 16)
    first, second = (network(pictures, torch.full((4,), label)) for label in (0, 1))
    assert not torch.allclose(first, second)
    plain = discriminator(head=head)
    assert torch.equal(plain(pictures, torch.zeros(4, dtype=torch.int64)), plain(pictures))


@pytest.mark.slow
def test_projections_keep_the_first_stage_from_drowning_its_branches():
    """log |shortcut| / |branch| of the first stage, after 300 steps on pictures against their blurs."""
    ratios = {skip: trained_ratios(skip) for skip in ("projection", "identity")}
    logs = {skip: sum(map(math.log, found)) / len(found) for skip, found in ratios.items()}
    assert logs["projection"] < logs["identity"] - 0.2, ratios


def trained_ratios(skip: str) -> list[float]:
    network = discriminator(
        skip=skip, widths=(16, 16), depths=(2, 1), num_heads=2, window=4, head_dim=16, group_size=1
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.0, 0.99))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        real, fake = pair(generator)
        logits = network(torch.cat((real, fake)))
        optimizer.zero_grad()
        discriminator_loss(logits[:8], logits[8:], "non_saturating").backward()
        optimizer.step()
    stage = network.stages[0]
    real, _ = pair(generator)
    maps = network.tokeniser(real)
    return list(norm_ratios(stage, lambda: stage(maps)).values())


def pair(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Squares on a ground, and their blurs: (8, 3, 16, 16) each."""
    colours = torch.rand(2, 8, 3, 1, 1, generator=generator) * 2 - 1
    place = torch.randint(0, 8, (8, 2), generator=generator)
    row, column = torch.arange(16)[:, None], torch.arange(16)[None, :]
    top, left = place[:, 0, None, None, None], place[:, 1, None, None, None]
    inside = (row >= top) & (row < top + 8) & (column >= left) & (column < left + 8)
    real = torch.where(inside, colours[0], colours[1])
    return real, nn.functional.avg_pool2d(real, 5, 1, 2, count_include_pad=False)
