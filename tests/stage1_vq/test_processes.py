"""Two processes train as one does on the whole batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from taming.config import build_config

STEPS = 3


def settings() -> VQTrainConfig:
    return build_config(
        VQTrainConfig,
        {
            "data": {"kind": "scenes"},
            "model": {
                "resolution": 16,
                "channels": 8,
                "channel_multipliers": [1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [],
                "z_channels": 8,
                "norm_num_groups": 4,
                "quantizer": {"kind": "nearest", "codebook_size": 16, "code_dim": 4, "kmeans_init": True},
            },
            "loss": {"perceptual_weight": 0.0},
            # Without batch statistics, which are those of each process's share.
            "discriminator": {
                "network": {"kind": "patchgan", "channels": 8, "num_layers": 1, "norm": "actnorm"},
                "r1": {"interval": 2},
                "lecam": {"weight": 0.1},
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": STEPS, "batch_size": 4, "clip_norm": None, "ema_decay": None},
        },
    )


def train(images: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    AcceleratorState._reset_state(True)
    task = VQTask(settings())
    task.prepare(Accelerator(cpu=True), STEPS)
    result: dict[str, Tensor] = {}
    for step in range(STEPS):
        logs = task.train_step([{"image": images}], step)
        result |= {
            f"{step}/{name}": logs[name] for name in ("rec", "adaptive_weight", "discriminator", "lecam")
        }
        if step == 0:
            gradients = task.model.named_parameters()
            result |= {f"grad/{name}": p.grad.clone() for name, p in gradients if p.grad is not None}
            found = task.adversary.discriminator.named_parameters()
            result |= {f"grad/judge.{name}": p.grad.clone() for name, p in found}
    result |= {f"model/{name}": value.clone() for name, value in task.model.state_dict().items()}
    judge = task.adversary.discriminator
    result |= {f"judge/{name}": value.clone() for name, value in judge.state_dict().items()}
    result |= {
        f"adversary/{name}": value.clone() for name, value in task.adversary.state.state_dict().items()
    }
    result |= {f"figures/{k}": torch.tensor(v) for k, v in task.evaluate([{"image": images}]).items()}
    AcceleratorState._reset_state(True)
    return result


def pictures() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    save_file(train(pictures()[rank::2]), Path(folder) / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(worker, args=(port, str(tmp_path)), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = train(pictures())
    assert first.keys() == second.keys() == alone.keys()
    assert alone["model/quantize.initialised"]
    for name, value in first.items():
        if not name.startswith("grad/") or "decoder" in name or "judge" in name:
            torch.testing.assert_close(value, second[name], rtol=0, atol=0, msg=f"ranks differ in {name}")
        if name.startswith(("0/", "grad/")):
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-5, msg=f"differs in {name}")
