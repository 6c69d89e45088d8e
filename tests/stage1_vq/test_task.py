"""The training step: the same gradients as the published order of work, and when which player plays."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from stage1_vq.adversarial_config import AdversarialConfig
from stage1_vq.config import VQTrainConfig
from stage1_vq.loss import adaptive_weight, reconstruction_loss
from stage1_vq.model import VQModel
from stage1_vq.task import VQTask
from taming.config import build_config
from taming.errors import UserError
from taming.gan.losses import discriminator_loss, generator_loss


def config(*, discriminator: dict | None, training: dict | None = None, **changes: object) -> VQTrainConfig:
    values = {
        "data": {"kind": "scenes"},
        "model": {
            "resolution": 16,
            "channels": 8,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [8],
            "z_channels": 8,
            "norm_num_groups": 4,
            "quantizer": {"kind": "nearest", "codebook_size": 12, "code_dim": 4},
        },
        "loss": {"perceptual_weight": 0.0},
        "discriminator": discriminator,
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 10, "batch_size": 4, "clip_norm": None, "ema_decay": None} | (training or {}),
    }
    return build_config(VQTrainConfig, values | changes)


def discriminator(**changes: object) -> dict:
    return {"network": {"kind": "patchgan", "channels": 8, "num_layers": 1}} | changes


def make_task(
    settings: VQTrainConfig, *, precision: str = "no", perceptual: nn.Module | None = None
) -> VQTask:
    torch.manual_seed(0)
    task = VQTask(settings, perceptual=perceptual)
    task.prepare(Accelerator(cpu=True, mixed_precision=precision), settings.training.steps)
    return task


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one precision for the whole process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class BlurredDistance(nn.Module):
    """A cheap differentiable stand-in for LPIPS."""

    def forward(self, found: Tensor, target: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(found - target, 4).square().mean()


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
def test_gradients_are_those_of_the_published_order_of_work(images: Tensor, loss: str):
    settings = config(
        discriminator=discriminator(loss=loss, weight=0.7),
        loss={"perceptual_weight": 0.5, "pixel_weight": 2.0},
    )
    task = make_task(settings, perceptual=BlurredDistance())
    model, critic = copy.deepcopy(task.model), copy.deepcopy(task.adversary.discriminator)
    logs = task.train_step([{"image": images}], step=0)

    # As published: one graph of everything, two backward passes for the weight, then one for the sum.
    output = model.train()(images)
    nll = reconstruction_loss(output.reconstruction, images, settings.loss, BlurredDistance()).total
    g_loss = generator_loss(critic(output.reconstruction))
    weight = 0.7 * adaptive_weight(nll, g_loss, model.last_layer)
    (nll + weight * g_loss + output.quantizer.loss).backward()
    torch.testing.assert_close(logs["adaptive_weight"], weight, rtol=1e-5, atol=0)
    found = dict(task.model.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, wanted = found[name].grad, parameter.grad
        assert (gradient - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-2), name

    critic.zero_grad()
    discriminator_loss(critic(images), critic(output.reconstruction.detach()), loss).backward()
    found = dict(task.adversary.discriminator.named_parameters())
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_micro_batches_give_the_gradients_of_the_whole_batch(images: Tensor):
    settings = config(discriminator=None)
    whole, parts = make_task(settings), make_task(settings)
    whole.train_step([{"image": images}], step=0)
    parts.train_step([{"image": images[:2]}, {"image": images[2:]}], step=0)
    found = dict(parts.model.named_parameters())
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adaptive_weight_is_the_ratio_of_norms_and_is_bounded():
    layer = torch.ones(2, requires_grad=True)
    found = adaptive_weight((3 * layer[0]).sum(), (2 * layer).sum(), layer)
    assert found.item() == pytest.approx(3 / (8**0.5 + 1e-4), rel=1e-6)
    assert not found.requires_grad
    assert adaptive_weight((1e9 * layer).sum(), layer.sum() * 1e-9, layer).item() == pytest.approx(1e4)
    with pytest.raises(RuntimeError, match="neither loss"):
        adaptive_weight(torch.ones((), requires_grad=True) * 2, torch.zeros(()), layer)


def test_discriminator_starts_warms_up_and_ramps(images: Tensor):
    settings = config(discriminator=discriminator(start_step=2, warmup_steps=2, ramp_steps=3))
    task = make_task(settings)
    start = copy.deepcopy(task.adversary.discriminator.state_dict())
    for step in range(2):
        assert "discriminator" not in task.train_step([{"image": images}], step)
    assert all(
        torch.equal(start[key], value) for key, value in task.adversary.discriminator.state_dict().items()
    )
    for step in (2, 3):
        logs = task.train_step([{"image": images}], step)
        assert "discriminator" in logs
        assert "adversarial" not in logs
    assert not torch.equal(start["main.0.weight"], task.adversary.discriminator.main[0].weight)
    assert "adversarial" in task.train_step([{"image": images}], 4)
    factors = [task.adversary.factor(step) for step in range(9)]
    assert factors == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_generator_pass_leaves_no_gradient_in_the_discriminator(images: Tensor):
    task = make_task(config(discriminator=discriminator()))
    output = task.model.train()(images)
    task.passes.judge(output, images, 0, task.adversary, 0, 1, blind=False)
    assert all(p.grad is None and p.requires_grad for p in task.adversary.discriminator.parameters())


def test_fixed_weight(images: Tensor):
    task = make_task(config(discriminator=discriminator(weight=0.3, weight_mode="fixed")))
    assert task.train_step([{"image": images}], 0)["adaptive_weight"].item() == pytest.approx(0.3)


def test_clipping_is_for_each_player_alone(images: Tensor):
    settings = config(discriminator=discriminator(), training={"clip_norm": 1e-3})
    task = make_task(settings)
    with torch.no_grad():
        task.adversary.discriminator.main[-1].weight.mul_(1e4)
    task.train_step([{"image": images}], 0)
    for module in (task.model, task.adversary.discriminator):
        norm = torch.stack([p.grad.norm() for p in module.parameters()]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_training_reduces_the_loss_and_the_average_follows(images: Tensor, precision: str):
    settings = config(discriminator=discriminator(start_step=4), training={"steps": 40, "ema_decay": 0.9})
    task = make_task(settings, precision=precision)
    before = task.evaluate([{"image": images}])
    logs = [task.train_step([{"image": images}], step) for step in range(40)]
    assert logs[-1]["rec"] < 0.8 * logs[0]["rec"]
    after = task.evaluate([{"image": images[:1]}, {"image": images[1:]}])
    assert after["psnr"] > before["psnr"] + 0.5
    assert 0 < after["code_usage"] <= 1
    assert 1 <= after["perplexity"] <= 12
    assert not torch.equal(task.ema.module.last_layer, task.model.last_layer)
    assert all(value.shape == () and not value.requires_grad for value in logs[-1].values())
    assert task.preview({"image": images}).ndim == 3


@pytest.mark.parametrize("guarded", [False, True])
def test_what_is_not_finite_is_named_before_anything_moves(images: Tensor, guarded: bool):
    task = make_task(config(discriminator=discriminator() | ({} if guarded else {"guard": None})))
    before = copy.deepcopy(task.model.state_dict())
    with torch.no_grad():
        task.adversary.discriminator.main[0].weight.fill_(float("nan"))
    if guarded:
        task.train_step([{"image": images}], 3)
        assert "adversarial" in task.guard.collapse
        assert "not finite" in task.guard.collapse
    else:
        with pytest.raises(UserError, match=r"diverged at step 3: .*adversarial.* not finite"):
            task.train_step([{"image": images}], 3)
    assert all(torch.equal(before[key], value) for key, value in task.model.state_dict().items())


def test_saved_model_is_the_average_and_can_be_the_start(images: Tensor, tmp_path):
    settings = config(discriminator=None, training={"ema_decay": 0.5})
    task = make_task(settings)
    for step in range(3):
        task.train_step([{"image": images}], step)
    task.save_model(tmp_path / "model")
    saved = VQModel.from_pretrained(tmp_path)
    assert saved.content_hash() == task.ema.module.content_hash()
    again = VQTask(config(discriminator=None, init_from=str(tmp_path)))
    assert again.model.content_hash() == saved.content_hash()
    other = settings.model.model_copy(update={"z_channels": 16}).model_dump()
    with pytest.raises(UserError, match="another model config"):
        VQTask(config(discriminator=None, init_from=str(tmp_path), model=other))


def test_a_perceptual_loss_needs_one_or_three_channels():
    model = config(discriminator=None).model.model_copy(update={"in_channels": 4}).model_dump()
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        VQTask(config(discriminator=None, model=model, loss={"perceptual_weight": 1.0}))


def test_evaluation_without_pictures_says_so():
    with pytest.raises(UserError, match="no validation pictures"):
        make_task(config(discriminator=None)).evaluate([])


def test_defaults_are_the_published_recipe():
    defaults = AdversarialConfig()
    assert (defaults.weight, defaults.weight_mode, defaults.loss) == (0.8, "adaptive", "hinge")
    assert config(discriminator=None).optimizer.betas == (0.5, 0.9)
