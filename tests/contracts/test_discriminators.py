"""Every discriminator: shapes, gradients of the first and second order, state, and one real step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from stage1_vq.task import VQTask
from stage1_vq.train import describe
from taming.config import Config, build_config
from taming.gan.discriminators import DiscriminatorConfig, build_discriminator
from taming.gan.discriminators.stylegan import StyleGANConfig, StyleGANDiscriminator, append_batch_deviation
from taming.gan.regularisers import gradient_penalty
from taming.layers.actnorm import ActNorm
from taming.layers.equalised import EqualisedConv2d
from taming.layers.spectral_norm import SpectralConv2d
from tests.conftest import vq_config

NETWORKS: dict[str, dict[str, Any]] = {
    **{
        f"patchgan-{norm}": {"kind": "patchgan", "channels": 4, "num_layers": 2, "norm": norm}
        for norm in ("batch", "actnorm", "group", "spectral", "none")
    },
    "stylegan": {"kind": "stylegan", "channels": 4, "max_channels": 8, "num_layers": 3},
    "stylegan-alone": {"kind": "stylegan", "channels": 4, "num_layers": 2, "group_size": 1},
}


class Section(Config):
    network: DiscriminatorConfig


def make(name: str, in_channels: int = 3) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    config = build_config(Section, {"network": NETWORKS[name]}).network
    return config, build_discriminator(config, in_channels)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_from_the_smallest_size_on(name: str):
    config, network = make(name, in_channels=2)
    least = config.smallest_size
    for height, width in ((least, least), (least, least + 13), (37, 16)):
        logits = network(torch.randn(2, 2, max(height, least), max(width, least)))
        assert logits.shape[:2] == (2, 1)
        assert logits.numel() >= 2
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_both_orders_reach_every_parameter(name: str):
    _, network = make(name)
    pictures = torch.randn(4, 3, 24, 32, requires_grad=True)
    network(pictures)  # a data-dependent start
    network(pictures).mean().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    network.zero_grad()
    gradient_penalty(network(pictures), pictures).backward()
    weights = [p for n, p in network.named_parameters() if p.ndim == 4 and not n.endswith("loc")]
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_state_is_all(name: str):
    _, network = make(name)
    pictures = torch.randn(4, 3, 24, 24)
    for _ in range(3):
        network(pictures)
    _, other = make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    other(pictures)
    other.load_state_dict(network.state_dict())
    for _ in range(2):
        torch.testing.assert_close(other(pictures), network(pictures), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_moves_both_players(name: str, precision: str):
    torch.manual_seed(0)
    settings = vq_config(
        discriminator={
            "network": NETWORKS[name],
            "loss": "non_saturating",
            "r1": {"interval": 1},
            "lecam": {},
            "augment": ["color", "translation", "cutout"],
        }
    )
    AcceleratorState._reset_state(True)
    task = VQTask(settings)
    task.prepare(Accelerator(cpu=True, mixed_precision=precision), 4)
    before = {n: p.detach().clone() for n, p in task.adversary.discriminator.named_parameters()}
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    for step in range(2):
        logs = task.train_step([{"image": images}], step)
    AcceleratorState._reset_state(True)
    assert {"adversarial", "adaptive_weight", "discriminator", "r1", "lecam"} <= logs.keys()
    assert logs["r1"] > 0
    assert logs["lecam"] > 0
    for parameter_name, parameter in task.adversary.discriminator.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), parameter_name


def test_spectral_norm_is_one_and_holds_still_in_eval():
    torch.manual_seed(0)
    conv = SpectralConv2d(8, 16, 4)
    pictures = torch.randn(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(50):
            conv(pictures)
    assert torch.linalg.svdvals(conv.weight.flatten(1))[0].item() == pytest.approx(1, abs=0.02)
    conv.eval()
    state = {key: value.clone() for key, value in conv.state_dict().items()}
    conv(pictures)
    assert all(torch.equal(state[key], value) for key, value in conv.state_dict().items())


def test_actnorm_starts_from_its_first_batch_and_then_learns():
    torch.manual_seed(0)
    norm = ActNorm(5)
    x = torch.randn(4, 5, 6, 7) * torch.arange(1.0, 6)[:, None, None] + 3
    torch.testing.assert_close(norm.eval()(x), x)  # nothing happens before the first training batch
    y = norm.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(5), atol=1e-4, rtol=0)
    loc = norm.loc.detach().clone()
    norm(x + 5)
    assert torch.equal(norm.loc, loc)
    assert norm.initialized == 1
    norm.load_state_dict(ActNorm(5).state_dict())  # back to before its first batch
    norm(x + 5)
    torch.testing.assert_close(norm.loc, loc - 5)


def test_equalised_convolutions_keep_the_deviation():
    torch.manual_seed(0)
    conv = EqualisedConv2d(64, 256, 3)
    assert conv(torch.randn(8, 64, 12, 12)).std().item() == pytest.approx(1, rel=0.05)
    logits = StyleGANDiscriminator(StyleGANConfig(channels=16, max_channels=32))(torch.randn(8, 3, 64, 64))
    assert 0.05 < logits.std() < 5  # blurring takes most of white noise away


def test_the_deviation_over_the_batch_is_the_loop():
    x = torch.randn(6, 3, 4, 5)
    found = append_batch_deviation(x, 4)  # 4 does not divide 6: groups of 3
    assert torch.equal(found[:, :3], x)
    for picture in range(6):
        group = x[[index for index in range(6) if index // 3 == picture // 3]]
        wanted = group.std(0, correction=0).mean()
        torch.testing.assert_close(found[picture, 3], wanted.expand(4, 5), rtol=1e-3, atol=1e-4)
    alone = append_batch_deviation(x[:1], 4)
    assert alone[:, 3].abs().max() < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dry_run_counts_it(name: str):
    facts = describe(vq_config(discriminator={"network": NETWORKS[name]}))
    wanted = sum(p.numel() for p in make(name)[1].parameters())
    assert f"{wanted:,} discriminator" in facts["parameters"]
