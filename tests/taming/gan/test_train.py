"""Runs of `taming gan train`: resumed, shared by processes, fitted to a time, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from taming.data.source import open_splits
from taming.errors import ConfigError, UserError
from taming.gan import train as training
from taming.gan.cli import app
from taming.gan.config import GANTrainConfig
from taming.gan.model import GANModel
from taming.gan.task import GANTask
from taming.gan.train import describe, fit_to_time, train
from taming.training.checkpoint import list_checkpoints
from tests.ranks import run_ranks
from tests.taming.gan.gan_config import gan_config, gan_values

LOSSES = {
    "discriminator", "generator", "r1", "gradient_penalty", "drift", "inconsistency_fake", "super_resolution",
}  # fmt: skip
TTUR = {
    "generator_optimizer": {"learning_rate": 1e-4, "schedule": "linear", "warmup_steps": 2},
    "discriminator_optimizer": {"learning_rate": 4e-4},
}


SMALL: dict[str, Any] = {"num_heads": 2, "depth": 1, "width": 16, "patch_size": 2}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "transgan": {  # without noise a token, of which each process draws its own
        "generator": {
            "kind": "transgan", "widths": [16, 4], "depths": [1, 1], "num_heads": 2, "token_noise": False,
            "super_resolution": True,
        },
        "discriminator": {"kind": "transgan", "patch_widths": [8], "depths": [1], "num_heads": 2},
        "loss": "wasserstein", "gradient_penalty": {}, "drift": 0.1, "super_resolution": {},
    },
    "vitgan": {
        "generator": {"kind": "vitgan", **SMALL}, "discriminator": {"kind": "vitgan", **SMALL},
        "consistency": {"augment": {"policy": ["color", "scaling", "cutout"], "probability": 0.8}},
    },
    "stransgan": {
        "generator": {"kind": "stransgan", "widths": [16, 16], "depths": [1, 1], "num_heads": 2},
        "discriminator": {
            "kind": "stransgan", "widths": [16], "depths": [2], "stem_halvings": 1, "num_heads": 2,
        },
        "loss": "non_saturating", "r1": {"interval": 2}, "augment": ["translation"],
    },
}  # fmt: skip


def state(run: Path) -> dict[str, torch.Tensor]:
    folder = list_checkpoints(run / "checkpoints")[-1]
    return {**load_file(folder / "modules.safetensors"), **load_file(folder / "optimizers.safetensors")}


def test_two_rates_hold_and_do_after_a_resume_that_leaves_no_trace(tmp_path: Path):
    settings: dict[str, Any] = {
        **TTUR,
        "discriminator_steps": 2,
        "lecam": {},
        "augment": ["color"],
        "training": {"steps": 5, "evaluate_every": 5, "checkpoint_every": 5},
    }
    whole = train(gan_config(**settings), tmp_path / "whole")
    seen: list[dict[str, float]] = []
    killed = False
    real = GANTask.train_step

    def watched(task: GANTask, batches: Any, step: int) -> dict[str, torch.Tensor]:
        nonlocal killed
        if step == 3 and not killed:
            killed = True
            raise KeyboardInterrupt
        logs = real(task, batches, step)
        seen.append({name: o.param_groups[0]["lr"] for name, o in task.optimizers().items()})
        return logs

    parts = tmp_path / "parts"
    settings["training"] = settings["training"] | {"checkpoint_every": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GANTask, "train_step", watched)
        with pytest.raises(KeyboardInterrupt):
            train(gan_config(**settings), parts)
        result = train(gan_config(**settings), parts)
    assert [rates["discriminator"] for rates in seen] == [4e-4] * 5
    assert seen[1]["model"] == pytest.approx(1e-4)
    assert seen[3]["model"] == pytest.approx(1e-4 * 0.5)  # linear, of 5 steps
    assert result.figures == whole.figures
    a, b = state(tmp_path / "whole"), state(parts)
    assert a.keys() == b.keys()
    assert {"lecam/means", "ema/n_averaged"} <= a.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
    saved = GANModel.from_pretrained(parts)
    average = {key.removeprefix("ema/module."): value for key, value in a.items()}
    assert all(torch.equal(average[name], value) for name, value in saved.state_dict().items())
    assert saved.config.class_names[0] == "house"
    assert (parts / "model/discriminator/config.json").is_file()


def watched_run(rank: int, config: GANTrainConfig, run: Path) -> dict[str, Any]:
    figures = train(config, run).figures
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] if rank == 0 else []
    return {"figures": figures, "log": [line for line in lines if line["kind"] == "train"]}


def check_two_processes(config: GANTrainConfig, folder: Path) -> None:
    """They are equal to the last bit, and one process on the whole batch gets the same figures."""
    ranks = run_ranks(watched_run, 2, config, folder / "two", timeout=120)
    assert [rank.error for rank in ranks] == [None, None]
    first, second = (rank.result for rank in ranks)
    assert first["figures"] == second["figures"]
    alone = watched_run(0, config, folder / "one")
    for found, wanted in zip(first["log"], alone["log"], strict=True):
        for name in wanted.keys() & LOSSES:
            assert found[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-4), (wanted["step"], name)
    wanted = alone["figures"]["feature_distance"]
    assert first["figures"]["feature_distance"] == pytest.approx(wanted, rel=1e-2)


def test_two_processes_are_one(tmp_path: Path):
    """Conditional batch norm, spectral norms, views, penalties: with the statistics of all processes."""
    config = gan_config(
        loss="non_saturating", gradient_penalty={}, drift=0.1, consistency={}, augment=["color"],
        generator_batch_size=8, training={"steps": 2, "verify_processes_every": 1, "evaluate_every": 2},
    )  # fmt: skip
    check_two_processes(config, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transgan", "vitgan", "stransgan"])
def test_two_processes_of_each_transformer_are_one(tmp_path: Path, kind: str):
    training = {"steps": 4, "batch_size": 8, "verify_processes_every": 1}
    check_two_processes(gan_config(**TRANSFORMERS[kind], training=training), tmp_path)


def test_as_many_steps_as_fit_into_the_time(monkeypatch: pytest.MonkeyPatch):
    config = gan_config(training={"steps": 400, "minutes": 1}, discriminator_steps=2)
    monkeypatch.setattr(training, "seconds_per_step", lambda *arguments, cycle: 0.27 * (cycle == 2))
    data = open_splits(config.data)[0]
    assert fit_to_time(config, data).training.steps == 200
    assert fit_to_time(config, data, 300).training.steps == 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sagan", "transgan", "vitgan", "stransgan"])
def test_a_dry_run_of_each_system(kind: str):
    players = {"generator": {"kind": kind}, "discriminator": {"kind": kind}}
    facts = describe(gan_config(data={"kind": "scenes", "size": 32}, **players))
    assert "house, pine" in facts["classes"]
    assert "MiB" in facts["memory in fp32"] or "GiB" in facts["memory in fp32"]


def test_the_command(tmp_path: Path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(gan_values()))
    shown = CliRunner().invoke(app, ["train", str(file), "--dry-run", "-o", "loss=wasserstein"])
    assert shown.exit_code == 0, shown.output
    assert "loss: wasserstein" in shown.output
    assert "house, pine" in shown.output
    refused = CliRunner().invoke(app, ["train", str(file), "-o", "loss=best"])
    assert isinstance(refused.exception, ConfigError)


@pytest.mark.parametrize("changes", [{"data.num_validation": 1}, {"training.evaluation_pictures": 1}])
def test_too_little_to_compare_samples_with_is_said_at_the_start(changes: dict[str, Any], tmp_path: Path):
    values = gan_values()
    for path, value in changes.items():
        section, name = path.split(".")
        values[section] = {**values[section], name: value}
    config = gan_config(**values)
    with pytest.raises(UserError, match=r"validation pictures, of which 1 would be used: 2 are the least"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
