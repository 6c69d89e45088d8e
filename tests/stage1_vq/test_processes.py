"""Several processes, or micro-batches, train as one process does on the whole batch."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from stage1_vq.train import train
from taming.config import build_config
from taming.data.batch import to_device
from taming.data.config import ScenesDataConfig
from taming.data.loader import train_batches
from taming.data.source import open_splits
from taming.training.checkpoint import list_checkpoints
from taming.training.distributed import make_accelerator
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_values
from tests.ranks import run_ranks

LOSSES = ("nll", "rec", "codebook", "commitment", "adversarial", "discriminator", "r1", "adaptive_weight")
PUBLISHED_RATE = 8 * 4.5e-6
"""For a batch of 8."""


def settings(kind: str, steps: int, **changes: Any) -> VQTrainConfig:
    """All at once: adversarial term, penalty, LeCam, augmentation, k-means, revival, an average."""
    quantizer = {"kind": kind, "codebook_size": 24, "code_dim": 4, "kmeans_init": True, "revive_after": 2}
    training = {
        **TINY_TRAINING, "steps": steps, "batch_size": 8, "evaluate_every": 1000, "checkpoint_every": 1000,
        "preview_every": 1000, "ema_decay": 0.9, "verify_processes_every": 1,
    }  # fmt: skip
    values = vq_values(
        data={"kind": "scenes", "size": 16, "num_train": 24, "num_validation": 7},
        model=TINY_MODEL | {"quantizer": quantizer},
        discriminator={
            "network": {"kind": "patchgan", "channels": 8, "num_layers": 1} | changes.pop("network", {}),
            "r1": {"interval": 3},
            "lecam": {"weight": 0.1},
            "augment": ["color", "translation"],
        },
        optimizer={"learning_rate": changes.pop("rate", PUBLISHED_RATE)},
        training=training | changes.pop("training", {}),
    )
    assert not changes
    return build_config(VQTrainConfig, values)


def watched_run(rank: int, config: VQTrainConfig, folder: Path) -> dict[str, Any]:
    """A real run, and what each of its steps saw and left."""
    seen: dict[str, Any] = {"keys": [], "logs": [], "digests": []}
    real = VQTask.train_step

    def watched(task: VQTask, batches: list[dict[str, Any]], step: int) -> dict[str, Tensor]:
        logs = real(task, batches, step)
        seen["keys"].append([key for batch in batches for key in batch["key"]])
        seen["logs"].append({name: float(value) for name, value in logs.items()})
        seen["digests"].append(digests(task))
        seen["revived"] = int((task.model.quantize.steps_unused == 0).sum())
        return logs

    VQTask.train_step = watched  # type: ignore[method-assign]
    try:
        seen["figures"] = train(config, folder).figures
    finally:
        VQTask.train_step = real  # type: ignore[method-assign]
    return seen


def digests(task: VQTask) -> dict[str, str]:
    """sha256 of every weight, buffer and moment."""
    state = {f"{name}/{k}": v for name, m in task.modules().items() for k, v in m.state_dict().items()}
    for name, optimizer in task.optimizers().items():
        for index, entries in optimizer.state_dict()["state"].items():
            state |= {f"{name}/{index}/{key}": value for key, value in entries.items()}
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in state.items()}


def check_one_run(config: VQTrainConfig, folder: Path) -> None:
    """The bars of several processes: the same pictures, losses, weights and figures as one process."""
    ranks = run_ranks(watched_run, 2, config, folder / "two", timeout=300)
    assert [rank.error for rank in ranks] == [None, None]
    first, second = (rank.result for rank in ranks)
    alone = watched_run(0, config, folder / "one")
    assert alone["keys"] == [a + b for a, b in zip(first["keys"], second["keys"], strict=True)]
    assert first["logs"] == second["logs"]  # to the last bit, the adaptive weight too
    assert first["digests"] == second["digests"]
    assert first["figures"] == second["figures"]
    for step, (found, wanted) in enumerate(zip(first["logs"], alone["logs"], strict=True)):
        assert found.keys() == wanted.keys()
        for name in wanted.keys() & set(LOSSES):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-7), (step, name)
        for name in ("code_usage", "perplexity"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-6), (step, name)
    for name, value in alone["figures"].items():
        assert first["figures"][name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ema", "nearest"])
def test_two_processes_are_one_for_twenty_steps(tmp_path: Path, kind: str):
    check_one_run(settings(kind, 20), tmp_path)
