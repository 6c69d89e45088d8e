"""Tiny trainings of GANs on the scenes, for several tests."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from taming.config import build_config
from taming.data.scenes import CLASS_NAMES
from taming.gan.config import GANTrainConfig
from taming.gan.task import GANTask

TRAINING: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "precision": "fp32",
    "clip_norm": None,
    "ema_decay": 0.9,
    "log_every": 1,
    "evaluate_every": 4,
    "preview_every": 4,
    "checkpoint_every": 4,
}


def gan_values(**changes: Any) -> dict[str, Any]:
    """A conditional SAGAN of 8 px; `changes` replace whole keys, and join in "training"."""
    training = TRAINING | changes.pop("training", {})
    return {
        "data": {"kind": "scenes", "size": 8, "num_train": 16, "num_validation": 6},
        "class_conditional": True,
        "generator": {"kind": "sagan", "channels": 2, "noise_dim": 4},
        "discriminator": {"kind": "sagan", "channels": 4},
        "generator_optimizer": {"learning_rate": 1e-4},
        "discriminator_optimizer": {"learning_rate": 4e-4},
        **changes,
        "training": training,
    }


def gan_config(**changes: Any) -> GANTrainConfig:
    return build_config(GANTrainConfig, gan_values(**changes))


def gan_task(*, precision: str = "no", **changes: Any) -> GANTask:
    config = gan_config(**changes)
    torch.manual_seed(0)
    task = GANTask(config, CLASS_NAMES)
    task.prepare(Accelerator(cpu=True, mixed_precision=precision), config.training.steps)
    return task
