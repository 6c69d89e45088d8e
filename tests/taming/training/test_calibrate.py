"""Runs that are to end in a given time."""

from __future__ import annotations

from pathlib import Path

from stage1_vq.config import VQTrainConfig
from stage1_vq.train import fit_to_time, train
from taming.config import build_config
from taming.data.dataset import open_dataset
from taming.training.calibrate import steps_of_run, steps_within
from tests.conftest import TINY_TRAINING, vq_values


def settings(**training: object) -> VQTrainConfig:
    discriminator = {"network": {"kind": "patchgan", "channels": 4, "num_layers": 1}}
    return build_config(
        VQTrainConfig,
        vq_values(
            discriminator={**discriminator, "start_step": 100, "warmup_steps": 20, "ramp_steps": 10},
            optimizer={"learning_rate": 1e-3, "warmup_steps": 10},
            training={**TINY_TRAINING, "evaluate_every": 1000, "preview_every": 1000, **training},
        ),
    )


def test_steps_that_fit() -> None:
    assert steps_within(100.0, 0.5, 1000) == 200
    assert steps_within(1000.0, 0.5, 1000) == 1000  # never more than asked for
    assert steps_within(1.0, 0.5, 1000) == 50


def test_a_shortened_training_keeps_its_shares() -> None:
    config = settings(steps=200).shortened(50)
    assert config.training.steps == 50
    assert config.optimizer.warmup_steps == 2
    assert config.discriminator is not None
    starts = config.discriminator
    assert (starts.start_step, starts.warmup_steps, starts.ramp_steps) == (25, 5, 2)


def test_a_fast_machine_makes_all_steps() -> None:
    config = settings(steps=60, minutes=60.0)
    assert fit_to_time(config, open_dataset(config.data, "train")) == config


def test_too_little_time_makes_fewer_steps_and_a_resumed_run_as_many(tmp_path: Path) -> None:
    config = settings(steps=100_000, minutes=0.001, checkpoint_every=10)
    result = train(config, tmp_path)
    assert result.steps == 50
    assert steps_of_run(tmp_path) == 50
    # The same command again: it is done, whatever the machine could do now.
    again = train(settings(steps=100_000, minutes=60.0 * 24, checkpoint_every=10), tmp_path)
    assert again.steps == 50
