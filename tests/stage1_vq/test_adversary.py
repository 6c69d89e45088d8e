"""The second player inside real steps and runs: its terms, its start, fine-tuning, and being held back."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq.config import VQTrainConfig
from stage1_vq.loss import blind_error
from stage1_vq.task import VQTask
from stage1_vq.train import check, train
from taming.config import build_config
from taming.errors import ArtifactError, ConfigError, UserError
from taming.gan.augment import AugmentConfig, draw_view
from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.regularisers import gradient_penalty
from taming.training import loop
from taming.training.checkpoint import list_checkpoints
from taming.training.guard import CollapseGuard
from taming.training.run import RunResult
from tests.conftest import TINY_TRAINING, vq_config, vq_values

NETWORK = {"kind": "patchgan", "channels": 4, "num_layers": 1, "norm": "group"}
EVERYTHING: dict[str, Any] = {
    "network": NETWORK | {"norm": "actnorm"},
    "start_step": 3,
    "start_on_plateau": {"window": 1, "share": 0.9},
    "warmup_steps": 1,
    "ramp_steps": 1,
    "r1": {"interval": 2},
    "lecam": {"weight": 0.1},
    "augment": ["color", "translation", "cutout"],
    "guard": {"window": 2},
}
STEP = 0


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_task(steps: int = 10, **discriminator: Any) -> VQTask:
    torch.manual_seed(0)
    task = VQTask(
        vq_config(
            discriminator={"network": NETWORK, **discriminator},
            training=TINY_TRAINING | {"clip_norm": None, "ema_decay": None},
        )
    )
    task.prepare(Accelerator(cpu=True), steps)
    return task


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def state(run: Path, number: int = -1) -> dict[str, Tensor]:
    folder = list_checkpoints(run / "checkpoints")[number]
    return {**load_file(folder / "modules.safetensors"), **load_file(folder / "optimizers.safetensors")}


def test_all_terms_together_are_their_sum(images: Tensor):
    """The gradients of both players against the terms put together by hand."""
    task = make_task(
        loss="non_saturating", weight=0.5, weight_mode="fixed", augment=["color", "translation", "cutout"],
        r1={"weight": 6, "interval": 3}, lecam={"weight": 0.2},
    )  # fmt: skip
    task.adversary.critic.lecam.update(torch.tensor(0.3), torch.tensor(-0.2))
    model, critic = copy.deepcopy(task.model), copy.deepcopy(task.adversary.discriminator)
    logs = task.train_step([{"image": images}], STEP)

    view = draw_view(AugmentConfig(policy=("color", "translation", "cutout")), images, step=STEP)
    output = model.train()(images)
    nll = (output.reconstruction - images).abs().mean()
    g_loss = generator_loss(critic(view(output.reconstruction)), "non_saturating")
    (nll + 0.5 * g_loss + output.quantizer.loss).backward()
    found = dict(task.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert (found[name].grad - parameter.grad).norm() <= 1e-4 * max(parameter.grad.norm(), 1e-2), name

    critic.zero_grad()
    real, fake = view(images).requires_grad_(), view(output.reconstruction.detach())
    logits_real, logits_fake = critic(real), critic(fake)
    lecam = (logits_real + 0.2).square().mean() + (logits_fake - 0.3).square().mean()
    r1 = gradient_penalty(logits_real, real)
    total = discriminator_loss(logits_real, logits_fake, "non_saturating") + 0.2 * lecam + 6 / 2 * 3 * r1
    total.backward()
    found = dict(task.adversary.discriminator.named_parameters())
    for name, parameter in critic.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(logs["r1"], r1.detach())
    torch.testing.assert_close(logs["lecam"], lecam.detach())
    wanted = 0.99 * torch.tensor([0.3, -0.2]) + 0.01 * torch.stack((logs["logits_real"], logs["logits_fake"]))
    torch.testing.assert_close(task.adversary.critic.lecam.means, wanted)


def test_stage_one_can_have_wasserstein_with_its_penalties(images: Tensor):
    terms: dict[str, Any] = {"loss": "wasserstein", "gradient_penalty": {}, "drift": 1e-3, "consistency": {}}
    task = make_task(**terms)
    logs = task.train_step([{"image": images}], STEP)
    assert {"gradient_penalty", "drift", "inconsistency_real", "inconsistency_fake"} <= logs.keys()
    half = 0.5 * (logs["logits_fake"] - logs["logits_real"])
    torch.testing.assert_close(logs["discriminator"], half)
    assert 0 < logs["adaptive_weight"] <= 0.8e4
    assert all(value.isfinite() for value in logs.values())


def test_r1_is_lazy_and_micro_batches_share_it(images: Tensor):
    whole, parts = (make_task(r1={"interval": 2}) for _ in range(2))
    for step in range(3):
        logs = whole.train_step([{"image": images}], step)
        again = parts.train_step([{"image": images[:2]}, {"image": images[2:]}], step)
        assert ("r1" in logs) == ("r1" in again) == (step % 2 == 0)
        if step == 0:
            torch.testing.assert_close(logs["r1"], again["r1"], rtol=1e-4, atol=0)
            found = dict(parts.adversary.discriminator.named_parameters())
            for name, parameter in whole.adversary.discriminator.named_parameters():
                torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_it_starts_on_a_plateau_and_no_later_than_its_step(images: Tensor):
    level = make_task(start_step=8, start_on_plateau={"window": 2, "share": 0.99}, warmup_steps=1)
    played = ["discriminator" in level.train_step([{"image": images}], step) for step in range(6)]
    assert played == [False] * 4 + [True] * 2
    assert level.adversary.factor(4) == 0
    assert level.adversary.factor(5) == 1
    assert level.notes() == ["the loss fell by less than 99.0% over 2 steps: the discriminator starts"]
    assert level.notes() == []
    falling = make_task(start_step=5, start_on_plateau={"window": 2, "share": 0})
    played = ["discriminator" in falling.train_step([{"image": images}], step) for step in range(6)]
    assert played[5]
    with pytest.raises(ConfigError, match="start_step 3, the latest start, comes before their end"):
        make_task(start_step=3, start_on_plateau={"window": 2})


def test_pictures_that_are_too_small_for_it_are_named():
    values = vq_values(discriminator={"network": NETWORK | {"num_layers": 3}})
    with pytest.raises(UserError, match=r"16x16 are too small for a discriminator .* 24 pixels a side"):
        check(build_config(VQTrainConfig, values))


def test_the_blind_error_is_that_of_each_pictures_mean_colour():
    config = vq_config()
    images = torch.tensor([[[[1.0, -1.0]], [[0.5, 0.5]]]])
    assert blind_error(images, config.loss).item() == pytest.approx(0.5)
    squares = config.loss.model_copy(update={"reconstruction": "l2"})
    assert blind_error(3 * images, squares).item() == pytest.approx(4.5)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resuming_with_all_of_it_on_equals_never_stopping(tmp_path: Path, stop: int):
    training = {**TINY_TRAINING, "steps": 7, "evaluate_every": 7, "checkpoint_every": 7}
    train(vq_config(discriminator=EVERYTHING, training=training), tmp_path / "whole")
    train(vq_config(discriminator=EVERYTHING, training=training | {"steps": stop}), tmp_path / "parts")
    train(vq_config(discriminator=EVERYTHING, training=training), tmp_path / "parts")
    a, b = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert {"adversary/lecam.means", "adversary/guard._extra_state", "codebook_alarm/counts"} <= a.keys()
    assert a["adversary/lecam.steps"] >= 3
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_fine_tuning_goes_on_with_the_saved_discriminator(tmp_path: Path):
    train(vq_config(discriminator={"network": NETWORK}), tmp_path / "first")
    described = json.loads((tmp_path / "first/model/discriminator/config.json").read_text())
    assert described["kind"] == "discriminator"
    saved = load_file(tmp_path / "first/model/discriminator/model.safetensors")
    for source in ("first", "first/model"):
        start = {"init_from": str(tmp_path / source)}
        task = VQTask(vq_config(discriminator={"network": NETWORK}, **start))
        found = task.adversary.discriminator.state_dict()
        assert all(torch.equal(found[name], value) for name, value in saved.items())
        assert task.notes() == []
    other = VQTask(vq_config(discriminator={"network": NETWORK | {"norm": "none"}}, **start))
    (note,) = other.notes()
    assert "is of another config" in note
    assert "starts anew" in note
    without = VQTask(vq_config(discriminator=None, **start))
    assert without.notes() == []
    (tmp_path / "first/model/discriminator/model.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="cannot be read"):
        VQTask(vq_config(discriminator={"network": NETWORK}, **start))
    shutil.rmtree(tmp_path / "first/model/discriminator")
    absent = VQTask(vq_config(discriminator={"network": NETWORK}, **start))
    assert "holds no discriminator: this run's starts anew" in absent.notes()[0]


def ruinous(run: Path, *, guard: bool, steps: int = 60, **discriminator: Any) -> RunResult:
    """A run whose discriminator counts fifty times as much as the reconstruction from the first step on."""
    settings = {"network": NETWORK | {"channels": 16}, "weight": 50, **discriminator}
    settings["guard"] = {"window": 10, "max_rollbacks": 1} if guard else None
    training = TINY_TRAINING | {"steps": steps, "batch_size": 8, "ema_decay": 0.9}
    training |= {"log_every": 20, "evaluate_every": steps, "checkpoint_every": 25, "preview_every": steps}
    values = {
        "data": {"kind": "scenes", "size": 16, "num_train": 256, "num_validation": 16},
        "discriminator": settings,
        "training": training,
        "optimizer": {"learning_rate": 4e-3},
    }
    return train(vq_config(**values), run)


def test_a_run_that_its_discriminator_ruins_is_caught_and_says_so(tmp_path: Path):
    alone = ruinous(tmp_path / "alone", guard=False)
    guarded = ruinous(tmp_path / "guarded", guard=True)
    assert alone.notes == ()
    assert guarded.figures["psnr"] > alone.figures["psnr"] + 2
    assert len(guarded.notes) == 1
    assert "the reconstruction collapsed" in guarded.notes[0]
    assert "went back to step 0, rollback 1 of at most 1" in guarded.notes[0]
    notes = records(tmp_path / "guarded", "note")
    assert [f"step {note['step']}: {note['text']}" for note in notes] == list(guarded.notes)
    steps = [record["step"] for record in records(tmp_path / "guarded", "train")]
    assert len(set(steps)) < len(steps)  # some were made twice
    assert steps[-1] == 60


def test_a_run_that_goes_well_is_left_alone(tmp_path: Path):
    result = ruinous(tmp_path, guard=True, weight=0.1, start_step=15, warmup_steps=10)
    assert result.notes == ()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")][-1] == "step-00000060"


def test_a_rollback_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed right after going back, or during it: the run ends as the one that was not."""
    training = TINY_TRAINING | {"steps": 9, "evaluate_every": 9, "checkpoint_every": 1, "preview_every": 9}
    settings = EVERYTHING | {"guard": {"window": 2, "weight_factor": 0.5}}

    def collapse_at_six(self: CollapseGuard, error: float, blind: float) -> str | None:
        return "as the test wants it" if self.windows == 2 and self.rollbacks == 0 else None

    monkeypatch.setattr(CollapseGuard, "_what_is_wrong", collapse_at_six)
    result = train(vq_config(discriminator=settings, training=training), tmp_path / "whole")
    assert len([note for note in result.notes if "as the test wants it" in note]) == 1
    for owner, moment in ((loop.Loop, "_tell"), (loop, "remove_checkpoints_after")):
        run = tmp_path / moment
        real = getattr(owner, moment)

        def killed(*arguments: object, real: Any = real) -> None:
            if "starts" not in str(arguments[-1]):  # the plateau is told too
                raise KeyboardInterrupt
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                train(vq_config(discriminator=settings, training=training), run)
        train(vq_config(discriminator=settings, training=training), run)
        a, b = state(tmp_path / "whole"), state(run)
        assert a["adversary/guard._extra_state"][CollapseGuard.saved.index("rollbacks")] == 1
        for name, value in a.items():
            assert torch.equal(value, b[name]), (moment, name)


def test_the_healthy_checkpoint_outlives_newer_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("taming.training.guard.CollapseGuard.observe", lambda self, *a, **k: None)
    training = TINY_TRAINING | {"steps": 6, "checkpoint_every": 1, "evaluate_every": 6, "keep_checkpoints": 2}
    train(vq_config(discriminator={"network": NETWORK, "start_step": 1}, training=training), tmp_path)
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "checkpoints")] == [1, 5, 6]


def test_what_is_not_finite_goes_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = VQTask.train_step

    def poisoned(self: VQTask, batches: Any, step: int) -> dict[str, Tensor]:
        if step == 3 and self.guard.rollbacks == 0:
            with torch.no_grad():
                self.adversary.discriminator.main[0].weight.fill_(float("nan"))
        return real(self, batches, step)

    monkeypatch.setattr(VQTask, "train_step", poisoned)
    settings = {"network": NETWORK, "start_step": 1, "guard": {"window": 1}}
    result = train(vq_config(discriminator=settings), tmp_path)
    assert "logits_real, logits_fake is not finite; went back to step" in result.notes[0]
    assert all(value == value for value in result.figures.values())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["discriminator"]["guard"]["window"] == 1
