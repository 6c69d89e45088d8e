"""What each part of the adversarial side adds to a training step of stage one.

    python benchmarks/adversarial_terms.py [--repeats N] [--size 64] [--batch 8]

The autoencoder, the discriminator and the losses are those of configs/stage1/photos_64.yaml, on random
pictures. "no discriminator" is the step before the discriminator starts, "plain" the step with it. R1 is
computed in every 16th step by default: both that step and the mean over 16 are shown. Medians of interleaved
repeats after a warm-up, and ratios to "plain": those are to be read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from taming.config import load_config, set_value
from taming.training.distributed import make_accelerator

PLAIN: dict[str, Any] = {"start_step": 0, "warmup_steps": 0, "ramp_steps": 0}
PATCHGAN = {"kind": "patchgan", "channels": 32, "num_layers": 2}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "no discriminator": None,
    "plain": {},
    "no guard": {"guard": None},
    "R1 at this step": {"r1": {"interval": 1}},
    "LeCAM": {"lecam": {}},
    "DiffAugment": {"augment": ["color", "translation", "cutout"]},
    "actnorm": {"network": PATCHGAN | {"norm": "actnorm"}},
    "group": {"network": PATCHGAN | {"norm": "group"}},
    "spectral": {"network": PATCHGAN | {"norm": "spectral"}},
    "stylegan, 32 channels": {"network": {"kind": "stylegan", "channels": 32, "max_channels": 128}},
}


def make_task(changes: dict[str, Any] | None, precision: str) -> VQTask:
    config = load_config(VQTrainConfig, "photos_64", ["data.root=/"], group="stage1")
    values = config.model_dump()
    if changes is None:
        values["discriminator"] = None
    else:
        for name, value in {**PLAIN, **changes}.items():
            set_value(values, f"discriminator.{name}", value)
    torch.manual_seed(0)
    task = VQTask(VQTrainConfig.model_validate(values))
    AcceleratorState._reset_state(True)
    task.prepare(make_accelerator(precision), 1000)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    arguments = parser.parse_args()
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size) * 2 - 1
    tasks = {name: make_task(changes, arguments.precision) for name, changes in CONTENDERS.items()}
    for task in tasks.values():
        task.train_step([{"image": images}], 0)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for step in range(1, arguments.repeats + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task.train_step([{"image": images}], step)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain = medians["plain"]
    medians["R1, mean of 16 steps"] = plain + (medians["R1 at this step"] - plain) / 16
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.size} px")
    for name, median in medians.items():
        print(f"{name:<24} {1000 * median:8.1f} ms {median / plain:6.2f}")


if __name__ == "__main__":
    main()
