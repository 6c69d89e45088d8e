"""Every quantizer inside the training task: it learns, its average is saved, and a resume goes on alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.config import VQTrainConfig
from stage1_vq.quantizers import QuantizerConfig
from stage1_vq.task import VQTask
from taming.config import build_config
from taming.training.distributed import make_accelerator
from tests.contracts.test_quantizers import CONFIGS

STEPS = 6


def started(quantizer: QuantizerConfig) -> VQTask:
    values: dict[str, Any] = {
        "data": {"kind": "scenes"},
        "model": {
            "resolution": 16,
            "channels": 8,
            "channel_multipliers": [1, 2],
            "num_res_blocks": 1,
            "attention_resolutions": [],
            "z_channels": 8,
            "norm_num_groups": 4,
            "quantizer": quantizer.model_dump(mode="json"),
        },
        "loss": {"perceptual_weight": 0.0},
        "discriminator": None,
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": STEPS, "batch_size": 4, "accumulation": 2, "ema_decay": 0.5},
    }
    torch.manual_seed(0)
    task = VQTask(build_config(VQTrainConfig, values))
    task.prepare(make_accelerator("fp32"), STEPS)
    return task


def pictures() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def train(task: VQTask, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        micro_batches = [{"image": half} for half in pictures().split(2)]
        losses.append(float(task.train_step(micro_batches, step)["rec"]))
    return losses


@pytest.mark.parametrize("quantizer", CONFIGS.values(), ids=CONFIGS.keys())
def test_each_quantizer_trains_saves_and_resumes(quantizer: QuantizerConfig, tmp_path: Path):
    task = started(quantizer)
    losses = train(task, 0, STEPS // 2)
    parts = task.modules() | {"optimizer": task.optimizers()["model"]}
    saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    losses += train(task, STEPS // 2, STEPS)
    assert min(losses[1:]) < losses[0]

    resumed = started(quantizer)
    resumed.modules()["model"].load_state_dict(saved["model"])
    resumed.modules()["ema"].load_state_dict(saved["ema"])
    resumed.optimizers()["model"].load_state_dict(saved["optimizer"])
    assert train(resumed, STEPS // 2, STEPS) == losses[STEPS // 2 :]
    for name, value in task.modules()["model"].state_dict().items():
        assert torch.equal(resumed.modules()["model"].state_dict()[name], value), name

    task.save_model(tmp_path)
    loaded = VQModel.from_pretrained(tmp_path)
    average = task.modules()["ema"].module
    assert torch.equal(loaded.encode(pictures()), average.encode(pictures()))
    assert loaded.codebook.isfinite().all()
