"""A GAN's training step: both players' gradients against all terms put together, and who moves when."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from taming.errors import ConfigError, UserError
from taming.gan.augment import AugmentConfig, draw_view
from taming.gan.critic import Wish
from taming.gan.noise import draw_noise, draw_shares
from taming.gan.task import GANTask, model_config
from tests.taming.gan.gan_config import gan_config, gan_task

ALL_TERMS: dict[str, Any] = {
    "loss": "wasserstein",
    "gradient_penalty": {"weight": 7},
    "drift": 0.5,
    "r1": {"weight": 3, "interval": 2},
    "lecam": {"weight": 0.1},
    "consistency": {"real": 2, "fake": 3, "augment": ["translation", "color"]},
    "augment": {"policy": ["cutout"], "cutout_probability": 0.5},
}
NO_NORM: dict[str, Any] = {"kind": "patchgan", "channels": 4, "num_layers": 1, "norm": "none"}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def batch(number: int = 4, size: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    images = torch.rand(number, 3, size, size, generator=random) * 2 - 1
    return {"image": images, "label": torch.arange(number) % 5}


def state(*modules: nn.Module) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in m.state_dict().items()} for m in modules]


def same(before: dict[str, Tensor], module: nn.Module) -> bool:
    return all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_gradients_of_both_players_are_those_of_all_terms_together():
    task = gan_task(**ALL_TERMS, generator_batch_size=6)
    critic, lecam = task.critic.network, task.critic.lecam
    lecam.update(torch.tensor(0.3), torch.tensor(-0.2))
    twin, painter = copy.deepcopy(critic).train(), copy.deepcopy(task.generator).train()
    given = batch()
    real, labels = given["image"], given["label"]
    logs = task.train_step([given], 2)
    learned = {name: p.detach().clone() for name, p in critic.named_parameters()}

    place = {"seed": 0, "step": 2}
    z = draw_noise(4, 4, **place, purpose="discriminator")
    with torch.no_grad():
        fake = copy.deepcopy(painter)(z, labels)
    view = draw_view(task.config.augment, real, **place)
    other = draw_view(AugmentConfig(policy=("translation", "color")), real, **place, stream=2)
    assert not torch.equal(view(real), real)
    seen = view(real).requires_grad_()
    shares = draw_shares(4, **place)[:, None, None, None]
    between = (shares * real + (1 - shares) * fake).requires_grad_()
    pictures = (seen, view(fake), other(seen), other(view(fake)), view(between))
    d_real, d_fake, d_real_seen, d_fake_seen, d_between = [twin(x, labels) for x in pictures]
    (slope,) = torch.autograd.grad(d_real.sum(), seen, create_graph=True)
    (slope_between,) = torch.autograd.grad(d_between.sum(), between, create_graph=True)
    length = slope_between.flatten(1).norm(dim=1)
    total = (
        d_fake.mean()
        - d_real.mean()
        + 7 * (length - 1).square().mean()
        + 0.5 * d_real.mean().square()
        + 3 / 2 * 2 * slope.square().flatten(1).sum(1).mean()
        + 0.1 * ((d_real + 0.2).square().mean() + (d_fake - 0.3).square().mean())
        + 2 * (d_real - d_real_seen).square().mean()
        + 3 * (d_fake - d_fake_seen).square().mean()
    )
    total.backward()
    for name, parameter in twin.named_parameters():
        wanted = critic.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-4, msg=name)

    with torch.no_grad():  # the generator learns from the critic that has just learned
        for name, parameter in twin.named_parameters():
            parameter.copy_(learned[name])
    z = draw_noise(6, 4, **place, purpose="generator")
    chosen = labels[[0, 0, 1, 2, 2, 3]]  # 6 of the 4 pictures' classes
    view = draw_view(task.config.augment, z, **place, stream=1)
    loss = -twin(view(painter(z, chosen)), chosen).mean()
    loss.backward()
    torch.testing.assert_close(logs["generator"], loss.detach())
    for name, parameter in painter.named_parameters():
        wanted = task.generator.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-5, msg=name)
    assert same(painter.state_dict() | dict(task.generator.named_parameters()), task.generator)


def test_the_generator_is_left_alone_while_the_discriminator_learns():
    task = gan_task(discriminator_steps=2)
    before = state(task.model, task.ema, task.critic.network)
    logs = task.train_step([batch()], 0)
    assert "generator" not in logs
    assert same(before[0], task.model)
    assert same(before[1], task.ema)
    assert not same(before[2], task.critic.network)
    assert all(p.grad is None for p in task.generator.parameters())
    assert "generator" in task.train_step([batch()], 1)
    assert not same(before[0], task.model)
    assert not same(before[1], task.ema)


def test_micro_batches_are_one_batch():
    """Where no batch statistics are: the same noise, classes, views and spectral norms."""
    settings: dict[str, Any] = {
        **ALL_TERMS,
        "drift": 0,  # the square of a micro-batch's mean
        "loss": "non_saturating",  # wasserstein has no gradient at the last bias, and Adam enlarges rounding
        "generator": {"kind": "sagan", "channels": 2, "noise_dim": 4, "norm": "group"},
        "generator_batch_size": 8,
    }
    whole, parts = (gan_task(**settings, training={"accumulation": n}) for n in (1, 2))
    given = batch()
    halves = [{name: value[rows] for name, value in given.items()} for rows in (slice(2), slice(2, 4))]
    logs, again = whole.train_step([given], 2), parts.train_step(halves, 2)
    assert logs.keys() == again.keys()
    for name in ("discriminator", "generator", "gradient_penalty", "r1", "inconsistency_fake"):
        torch.testing.assert_close(again[name], logs[name], rtol=1e-4, atol=1e-6, msg=name)
    for name, parameter in whole.generator.named_parameters():
        wanted = parts.generator.get_parameter(name).grad
        torch.testing.assert_close(wanted, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    for name, value in whole.critic.network.state_dict().items():
        torch.testing.assert_close(
            parts.critic.network.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name
        )


def test_each_player_is_clipped_by_itself():
    task = gan_task(training={"clip_norm": 1e-3})
    logs = task.train_step([batch()], 0)
    for name, player in (("generator", task.generator), ("discriminator", task.critic.network)):
        norm = torch.stack([p.grad.norm() for p in player.parameters()]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=0.01)
        assert logs[f"gradient_{name}"] > 0.1


def test_half_precision_trains_both_players():
    task = gan_task(**ALL_TERMS, precision="bf16")
    before = state(task.model, task.critic.network)
    logs = task.train_step([batch()], 0)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in logs.values())
    assert all(p.grad.isfinite().all() for p in task.generator.parameters())
    assert not same(before[0], task.model)
    assert not same(before[1], task.critic.network)


def test_a_view_that_changes_nothing_is_consistent():
    settings: dict[str, Any] = {"discriminator": NO_NORM, "class_conditional": False}
    plain = gan_task(**settings)
    task = gan_task(**settings, consistency={"augment": []})
    wanted, logs = plain.train_step([batch()], 0), task.train_step([batch()], 0)
    assert logs["inconsistency_real"] == 0
    assert logs["inconsistency_fake"] == 0
    torch.testing.assert_close(logs["gradient_discriminator"], wanted["gradient_discriminator"])
    moved = gan_task(**settings, consistency={}).train_step([batch()], 0)
    assert moved["inconsistency_real"] > 0


def test_second_derivatives_pass_through_attention():
    discriminator = {
        "kind": "transgan", "patch_size": 2, "patch_widths": [8], "depths": [1], "num_heads": 2,
    }  # fmt: skip
    task = gan_task(discriminator=discriminator, gradient_penalty={}, r1={})
    logs = task.train_step([batch()], 0)
    assert all(value.isfinite() for value in logs.values())
    assert logs["gradient_penalty"] > 0
    gradients = [p.grad for p in task.critic.network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("player", ["discriminator", "generator"])
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_what_is_not_finite_moves_nothing_of_its_player(
    monkeypatch: pytest.MonkeyPatch, policy: str, player: str
):
    task = gan_task(training={"on_nonfinite": policy})
    task.train_step([batch()], 0)
    given = batch()
    before = state(task.model, task.ema, task.critic.network)
    if player == "discriminator":
        given["image"][0, 0, 0, 0] = float("nan")
    else:
        judge = task.critic.judge

        def spoilt(picture: Tensor, *rest: Any) -> Wish:
            gradient, loss = judge(picture, *rest)
            return Wish(gradient * float("nan"), loss)

        monkeypatch.setattr(task.critic, "judge", spoilt)
    if policy == "stop":
        with pytest.raises(UserError, match=r"diverged at step 1: .*(logits_real|gradient of the generator)"):
            task.train_step([given], 1)
    else:
        logs = task.train_step([given], 1)
        assert "generator" not in logs
        assert ("discriminator" in logs) == (player == "generator")
        (note,) = task.notes()
        assert "a step was left out" in note
    assert same(before[0], task.model)
    assert same(before[1], task.ema)
    if player == "discriminator":
        assert same(before[2], task.critic.network)
    else:  # its update was made; what the judging has moved was taken back
        assert all(value.isfinite().all() for value in task.critic.network.state_dict().values())
    monkeypatch.undo()
    assert "generator" in task.train_step([batch()], 2)


def test_samples_to_look_at_and_to_measure_depend_on_no_batch():
    task = gan_task()
    sheet = task.preview(batch())
    assert torch.equal(sheet, task.preview({}))
    assert sheet.shape == (3, 5 * 10 + 2, 8 * 10 + 2)  # a row a class, a column a noise
    given = batch(6)
    whole = task.evaluate([given])
    parts = task.evaluate([{k: v[:1] for k, v in given.items()}, {k: v[1:] for k, v in given.items()}])
    assert parts["feature_distance"] == pytest.approx(whole["feature_distance"], rel=1e-4)
    assert gan_task(class_conditional=False).preview({}).shape == (3, 4 * 10 + 2, 8 * 10 + 2)


def test_noise_is_a_function_of_its_place():
    z = draw_noise(6, 5, seed=3, step=2)
    assert torch.equal(draw_noise(2, 5, seed=3, step=2, first=4), z[4:])
    assert torch.equal(draw_noise(3, 5, seed=3, step=2, first=1, stride=2), z[1::2])
    others = [
        draw_noise(6, 5, seed=3, step=3),
        draw_noise(6, 5, seed=4, step=2),
        draw_noise(6, 5, seed=3, step=2, purpose="generator"),
    ]
    assert all(not torch.isclose(other, z).any() for other in others)
    many = draw_noise(200, 50, seed=1)
    assert abs(many.mean()) < 0.03
    assert many.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"super_resolution": {}}, "kind sagan has no layer"),
        ({"data": {"kind": "folder", "root": "x", "size": 8}}, r"set data\.class_labels: true"),
        ({"discriminator": NO_NORM}, "patchgan does not judge classes"),
        ({"data": {"kind": "scenes", "size": 6}}, "generator: SAGAN doubles"),
        ({"generator_batch_size": 3, "training": {"accumulation": 2}}, "not divisible by training.accumul"),
        (
            {
                "generator": {
                    "kind": "transgan",
                    "widths": [16, 4],
                    "depths": [1, 1],
                    "super_resolution": True,
                }
            },
            "go together",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        gan_config(**changes)


def test_classes_must_be_there():
    with pytest.raises(ConfigError, match=r"set data\.class_labels: true"):
        model_config(gan_config(), ())
    assert model_config(gan_config(class_conditional=False), ("a",)).num_classes is None


def test_a_shorter_training_keeps_its_shares():
    config = gan_config(
        generator_optimizer={"learning_rate": 1e-4, "warmup_steps": 40}, training={"steps": 400}
    )
    short = config.shortened(100)
    assert (short.training.steps, short.generator_optimizer.warmup_steps) == (100, 10)


def test_super_resolution_learns_from_real_pictures():
    generator = {
        "kind": "transgan", "widths": [16, 4], "depths": [1, 1], "num_heads": 2, "noise_dim": 4,
        "super_resolution": True, "window": None,
    }  # fmt: skip
    task = gan_task(generator=generator, super_resolution={"weight": 5})
    first = task.train_step([batch()], 0)["super_resolution"]
    assert task.generator.from_low.weight.grad.abs().sum() > 0
    assert first > 0


def test_schedules_are_told_to_the_generator_and_its_average():
    task = gan_task(training={"steps": 10})
    told: list[tuple[str, float]] = []
    for name, model in (("model", task.model), ("ema", task.ema.module)):
        model.generator.before_step = lambda progress, name=name: told.append((name, progress))
    assert isinstance(task, GANTask)
    task.train_step([batch()], 5)
    assert told == [("model", 0.5), ("ema", 0.5)]
