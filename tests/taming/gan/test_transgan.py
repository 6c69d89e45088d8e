"""TransGAN's parts against what the paper and its code say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.config import build_config
from taming.data.scenes import render_scene
from taming.errors import ConfigError, UserError
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.transgan import TransGANDiscriminatorConfig
from taming.gan.generator import Generator
from taming.gan.generators import build_generator, build_trunk
from taming.gan.generators.transgan import TransGANGenerator, TransGANGeneratorConfig, TransGANTrunk
from taming.gan.locality import Locality, LocalityConfig
from taming.gan.probes import attention_distance, record_attention

SMALL = {"noise_dim": 8, "widths": (32, 8), "depths": (1, 1), "num_heads": 2, "mlp_ratio": 2}
JUDGE = {"patch_size": 2, "patch_widths": (12, 4), "depths": (1, 1), "num_heads": 2, "mlp_ratio": 2}
FIRST_JUDGE = {**JUDGE, "patch_widths": (16,), "depths": (0,), "head_depth": 2, "relative_bias": False}


def painter(num_classes: int | None = None, size: int = 8, **changes: Any) -> TransGANGenerator:
    torch.manual_seed(0)
    config = build_config(TransGANGeneratorConfig, {**SMALL, **changes})
    generator = build_generator(config, size=(size, size), num_classes=num_classes)
    assert isinstance(generator, TransGANGenerator)
    return generator


def judge(num_classes: int | None = None, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = build_config(TransGANDiscriminatorConfig, {**JUDGE, **changes})
    return build_discriminator(config, size=(8, 8), num_classes=num_classes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "pixel", "token_noise": False},
        {"relative_bias": False, "locality": {}},
        {"widths": (8, 8), "rgb": "every"},
        {"window": 4, "window_from": 8},
    ],
    ids=["released", "pixel_norm", "first", "bicubic", "windows"],
)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_every_kind_paints_and_every_weight_learns(changes: dict[str, Any], num_classes: int | None) -> None:
    generator = painter(num_classes, **changes)
    classes = None if num_classes is None else torch.tensor([0, 1, 2])
    images = generator(torch.randn(3, 8), classes)
    assert images.shape == (3, 3, 8, 8)
    images.square().mean().backward()
    still = [name for name, p in generator.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    again = painter(num_classes, **changes)
    again.load_state_dict(generator.state_dict())
    z = torch.randn(3, 8)
    assert torch.equal(again.eval()(z, classes), generator.eval()(z, classes))


def test_sizes_other_than_square_are_painted() -> None:
    config = build_config(TransGANGeneratorConfig, SMALL)
    assert build_generator(config, size=(8, 16))(torch.randn(2, 8)).shape == (2, 3, 8, 16)


def test_a_class_changes_the_picture_only_where_there_are_classes() -> None:
    z = torch.randn(1, 8)
    conditional, plain = painter(3).eval(), painter().eval()
    assert not torch.equal(conditional(z, torch.tensor([0])), conditional(z, torch.tensor([1])))
    assert torch.equal(plain(z, torch.tensor([0])), plain(z))
    with pytest.raises(UserError, match="3 classes"):
        conditional(z)


def test_released_widths_and_depths_are_the_defaults() -> None:
    config = TransGANGeneratorConfig()
    assert (config.widths, config.depths, config.noise_dim) == ((1024, 256, 64), (5, 4, 2), 256)
    judging = TransGANDiscriminatorConfig()
    assert (judging.widths, judging.grids(32, 32)) == ((288, 384), [(16, 16), (8, 8)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"widths": (30, 8)}, "30 is not divisible by 4"),
        ({"widths": (32, 16)}, "use 32 .bicubic., or 8 .pixel shuffle."),
        ({"widths": (36, 9)}, "9 is not divisible by num_heads 2"),
        ({"depths": (1, 1, 1)}, "one depth of 1 or more a width"),
        ({"widths": (8,), "depths": (1,), "super_resolution": True}, "two or more widths"),
        ({"locality": {"until": (0.1, 0.2)}}, "one end a width"),
        ({"locality": {"until": (0.1, 0.3, 0.2, 0.5)}}, "must rise"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config(TransGANGeneratorConfig, {**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 9, "divisible by 2, not 9x9"),
        ({"window": 3, "window_from": 8}, 8, "window 3 does not divide the 8x8 cells"),
        ({"window": 4, "window_from": 8, "locality": {}}, 8, "locality masks the last stage"),
    ],
)
def test_sizes_that_cannot_be_painted_are_refused(changes: dict[str, Any], size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        painter(size=size, **changes)


@pytest.mark.parametrize("mode", ["raster", "window"])
def test_the_last_block_sees_no_farther_than_its_mask(mode: str) -> None:
    """Moving token j beyond the width leaves output i as it was; after the schedule it does not."""
    locality = {"mode": mode, "widths": (2,), "until": (0.5,)}
    trunk = painter(relative_bias=False, token_noise=False, locality=locality).trunk
    tokens = torch.randn(1, 64, 8)
    moved = tokens.clone()
    j = 3 * 8 + 3
    moved[0, j] = torch.randn(8)
    rows, columns = torch.arange(64) // 8, torch.arange(64) % 8
    distance = (torch.arange(64) - j).abs()
    if mode == "window":
        distance = torch.maximum((rows - 3).abs(), (columns - 3).abs())

    def changed() -> torch.Tensor:
        # From the last stage on: the stage before sees all.
        difference = trunk.run(moved, first=1).images - trunk.run(tokens, first=1).images
        return difference.flatten(2).abs().amax((0, 1)) > 0

    assert torch.equal(changed(), distance <= 2)
    trunk.before_step(0.5)
    assert changed().all()


def test_the_schedule_of_widths_follows_the_training() -> None:
    locality = Locality(LocalityConfig(), (6, 6))
    seen = []
    for progress in (0.0, 0.1, 0.11, 0.2, 0.25, 0.299):
        locality.before_step(progress)
        mask = locality.mask()
        assert mask is not None
        seen.append(int(mask[0].sum()) - 1)
    assert seen == [4, 4, 6, 8, 10, 10]
    locality.before_step(0.3)
    assert locality.mask() is None


def test_a_saved_model_sees_as_far_as_it_had_learned() -> None:
    half, loaded = (painter(relative_bias=False, locality={}) for _ in range(2))
    half.before_step(1.0)
    loaded.load_state_dict(half.state_dict())
    z = torch.randn(2, 8)
    assert torch.equal(loaded(z), half(z))  # in train mode too
    loaded.before_step(0.0)
    assert not torch.equal(loaded(z), half(z))


@pytest.mark.parametrize("mode", ["raster", "window"])
def test_attention_reaches_farther_as_the_training_goes_on(mode: str) -> None:
    locality = {"mode": mode, "widths": (1, 2, 4, 6), "until": (0.2, 0.4, 0.6, 0.8)}
    generator = painter(relative_bias=False, locality=locality)
    z = torch.randn(2, 8)
    last, other = "trunk.stages.1.blocks.0.attention", "trunk.stages.0.blocks.0.attention"
    reach, before = [], []
    for progress in (0.0, 0.2, 0.4, 0.6, 0.8):
        generator.before_step(progress)
        seen = record_attention(generator, lambda: generator(z))
        reach.append(attention_distance(seen[last], (8, 8)).mean().item())
        before.append(attention_distance(seen[other], (4, 4)).mean().item())
    assert reach == sorted(reach)
    assert reach[0] < 0.6 * reach[-1]
    assert before == [before[0]] * 5  # the stages before see all from the start


def test_the_relative_bias_is_that_of_the_offset() -> None:
    stages: Any = painter().trunk.stages
    attention = stages[0].blocks[0].attention
    relative = attention.relative
    tokens = torch.randn(1, 16, 32)
    before = attention(tokens)
    with torch.no_grad():
        relative.table.normal_()
    bias = relative()
    for i in range(16):
        for j in range(16):
            down, right = i // 4 - j // 4, i % 4 - j % 4
            assert torch.equal(bias[:, i, j], relative.table[(down + 3) * 7 + right + 3])
    assert not torch.allclose(attention(tokens), before)


@pytest.mark.parametrize(("width", "kind"), [(32, "bicubic"), (8, "shuffle")])
def test_tokens_are_enlarged_as_maps_are(width: int, kind: str) -> None:
    stages: Any = painter(widths=(32, width)).trunk.stages
    maps = torch.randn(2, 32, 4, 4)
    if kind == "shuffle":
        expected = torch.nn.PixelShuffle(2)(maps)
    else:
        expected = F.interpolate(maps, scale_factor=2, mode="bicubic")
    enlarged = stages[1].enlarge(maps.flatten(2).transpose(1, 2))
    assert torch.allclose(enlarged.transpose(1, 2).reshape(2, width, 8, 8), expected, atol=1e-6)


def test_noise_has_no_strength_at_first_and_none_of_its_own_in_eval() -> None:
    generator = painter()
    z = torch.randn(2, 8)
    assert torch.equal(generator(z), generator(z))
    strengths = [p for name, p in generator.named_parameters() if name.endswith("strength")]
    assert len(strengths) == 2
    for strength in strengths:
        assert strength == 0
        torch.nn.init.constant_(strength, 0.5)
    assert not torch.equal(generator(z), generator(z))
    generator.eval()
    assert torch.equal(generator(z), generator(z))
    # Nor does a picture depend on the batch that it is painted in.
    assert torch.allclose(generator(z)[1:], generator(z[1:]), atol=1e-6)


def test_pictures_of_every_stage_are_summed() -> None:
    generator = painter(rgb="every").eval()
    trunk: Any = generator.trunk
    images, features = generator.painted(torch.randn(2, 8))
    assert [tuple(each.shape[1:]) for each in features] == [(32, 4, 4), (8, 8, 8)]
    low, high = (layer(each) for layer, each in zip(trunk.to_rgb, features, strict=True))
    assert torch.allclose(images, F.interpolate(low, scale_factor=2) + high, atol=1e-6)


@pytest.mark.parametrize("rgb", ["last", "every"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_a_trunk_takes_up_where_the_latents_are(rgb: str, factor: int) -> None:
    config = build_config(
        TransGANGeneratorConfig, {**SMALL, "widths": (128, 32, 8), "depths": (1, 1, 1), "rgb": rgb}
    )
    trunk = build_trunk(config, start=(16 // factor, 8 // factor), size=(16, 8))
    assert trunk.in_channels == {1: 8, 2: 32, 4: 128}[factor]
    latents = torch.randn(2, trunk.in_channels, 16 // factor, 8 // factor)
    painted = trunk(latents)
    assert painted.images.shape == (2, 3, 16, 8)
    gradient = torch.randn_like(painted.images)
    (expected,) = torch.autograd.grad(painted.images, trunk.last_layer, gradient)
    assert torch.allclose(trunk.last_gradient(painted.features, gradient), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("start", "said"), [((2, 2), "2 widths, .* takes 3"), ((3, 3), "do not become 8x8")])
def test_latents_that_lead_to_no_picture_are_refused(start: tuple[int, int], said: str) -> None:
    config = build_config(TransGANGeneratorConfig, SMALL)
    with pytest.raises(ConfigError, match=said):
        build_trunk(config, start=start, size=(8, 8))


@pytest.mark.parametrize("changes", [{}, FIRST_JUDGE, {"norm": "pixel"}, {"window": 2, "window_from": 4}])
@pytest.mark.parametrize("num_classes", [None, 3])
def test_every_kind_judges_and_every_weight_learns(changes: dict[str, Any], num_classes: int | None) -> None:
    network = judge(num_classes, **changes)
    images, classes = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2])
    logits = network(images, classes)
    assert logits.shape == (3, 1)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    other = network(images, classes.flip(0))
    assert torch.equal(other, logits) is (num_classes is None)


def test_the_verdict_is_that_of_the_class_token() -> None:
    network: Any = judge(3)
    seen: list[torch.Tensor] = []
    network.norm.register_forward_hook(lambda module, given, tokens: seen.append(tokens))
    classes = torch.tensor([0, 2])
    logits = network(torch.randn(2, 3, 8, 8), classes)
    assert seen[0].shape == (2, 1 + 4, 16)
    assert torch.equal(network.head(seen[0][:, 0], classes), logits)


def test_all_blocks_of_a_scale_but_the_last_have_windows() -> None:
    network: Any = judge(patch_widths=(16,), depths=(2,), window=2, window_from=4)
    scale = network.scales[0]
    tokens = torch.randn(1, 16, 16)
    moved = tokens.clone()
    moved[0, 0] = torch.randn(16)
    first = [scale.blocks[0](each, grid=(4, 4)) for each in (tokens, moved)]
    changed = (first[0] != first[1]).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [0, 1, 4, 5]
    second = [scale.blocks[1](each, grid=(4, 4)) for each in first]
    assert (second[0] != second[1]).any(2).all()


def test_tokens_of_the_coarsest_scale_may_be_judged_each() -> None:
    network = judge(head="tokens")
    assert network(torch.randn(2, 3, 8, 8)).shape == (2, 1, 2, 2)
    with pytest.raises(ConfigError, match="judges no classes"):
        judge(3, head="tokens")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch_widths": (13, 4)}, "width 13 are not divisible by num_heads 2"),
        ({"depths": (1,)}, "one depth of 0 or more"),
        ({"head_depth": 0}, "meets no other"),
        ({"patch_size": 3}, "patches of 6 pixels"),
        ({"window": 3, "window_from": 4}, "window 3 does not divide the 4x4 tokens"),
    ],
)
def test_judges_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        judge(**changes)


@pytest.mark.parametrize("changes", [{}, FIRST_JUDGE])
def test_a_gradient_penalty_goes_through_the_judge(changes: dict[str, Any]) -> None:
    """The penalty's own gradient agrees with a difference of penalties along a step."""
    network = judge(**changes).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True)

    def penalty() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            logits = network(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

    weights = [p for p in network.parameters() if p.numel() > 1]
    slopes = torch.autograd.grad(penalty(), weights, allow_unused=True)
    step, expected = 1e-4, 0.0
    directions = [torch.randn_like(p) for p in weights]
    for slope, direction in zip(slopes, directions, strict=True):
        if slope is not None:
            assert slope.isfinite().all()
            expected += float((slope * direction).sum())
    found = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, direction in zip(weights, directions, strict=True):
                p.add_(direction, alpha=sign * step)
        found.append(penalty().item())
    assert abs(expected) > 1e-3
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=1e-3)


def test_super_resolution_wants_its_layer() -> None:
    assert painter().super_resolution_size is None
    with pytest.raises(ConfigError, match="super_resolution: true"):
        painter().super_resolve(torch.randn(1, 3, 4, 4))
    assert painter(super_resolution=True, widths=(128, 32, 8), depths=(1, 1, 1)).super_resolution_size == (
        4,
        4,
    )


@pytest.mark.slow
def test_co_training_learns_to_super_resolve() -> None:
    """Better than the nearest neighbour's on the 64 pictures that it has seen for some hundred steps."""
    scenes = [render_scene(0, index, (16, 16)).image for index in range(64)]
    real = torch.stack([torch.from_numpy(scene).permute(2, 0, 1).float() / 127.5 - 1 for scene in scenes])
    low = F.interpolate(real, size=(8, 8), mode="area")
    generator = painter(
        size=16, widths=(256, 64, 16), depths=(1, 1, 1), super_resolution=True, relative_bias=False
    )
    assert isinstance(generator, Generator)
    assert generator.super_resolution_size == (8, 8)
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.0, 0.99))
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        chosen = torch.randint(64, (16,), generator=random)
        loss = F.mse_loss(generator.super_resolve(low[chosen]), real[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        error = F.mse_loss(generator.eval().super_resolve(low), real)
    assert error < F.mse_loss(F.interpolate(low, scale_factor=2), real)


def test_the_trunk_is_what_stage_one_takes() -> None:
    config = build_config(TransGANGeneratorConfig, SMALL)
    trunk = build_trunk(config, start=(4, 4), size=(8, 8))
    assert isinstance(trunk, TransGANTrunk)
    trunk.check_size(8, 8)
    with pytest.raises(UserError, match="8x8 only"):
        trunk.check_size(16, 16)
