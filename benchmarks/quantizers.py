"""Every quantizer for the same time: a small f4 model on the built-in scenes at 64 px.

    python benchmarks/quantizers.py [--seconds 120] [--kinds nearest ema ...] [--out FOLDER]

The same encoder and decoder (about a million parameters), squared error, no discriminator, Adam at 1e-3 down
to nearly 0 along a cosine; as many steps as 8 timed ones let expect in the time. PSNR, usage and perplexity
are of 128 validation scenes, 32768 cells, with the model itself (no averaged weights). A table with a text
beside it goes to FOLDER/quantizers.json and quantizers.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from taming.config import build_config
from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.training.distributed import make_accelerator, resolve_precision

TABLE = {"codebook_size": 512, "code_dim": 8}
HEALTH = {"kmeans_init": True, "revive_after": 100}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "nearest": {"kind": "nearest", **TABLE, **HEALTH, "l2_normalised": True},
    "nearest, rotation": {"kind": "nearest", **TABLE, **HEALTH, "gradient": "rotation"},
    "nearest, as published": {"kind": "nearest", "codebook_size": 512, "code_dim": 64, "beta_on": "codebook"},
    "ema": {"kind": "ema", **TABLE, **HEALTH},
    "gumbel": {
        "kind": "gumbel",
        "codebook_size": 512,
        "code_dim": 64,
        "temperature_start": 2.0,
        "temperature_end": 0.1,
        "kl_weight": 5e-3,
    },
    "fsq": {"kind": "fsq", "levels": [8, 8, 8]},
    "lfq": {"kind": "lfq", "num_bits": 9},
    "bsq": {"kind": "bsq", "num_bits": 9},
    "simvq": {"kind": "simvq", **TABLE, **HEALTH},
    "residual": {"kind": "residual", "num_stages": 2, "codes_per_stage": 22, "code_dim": 8, **HEALTH},
    "ibq": {"kind": "ibq", **TABLE, **HEALTH, "l2_normalised": True},
}
CALIBRATION_STEPS = 8


def settings(quantizer: dict[str, Any]) -> VQTrainConfig:
    return build_config(
        VQTrainConfig,
        {
            "data": {"kind": "scenes", "size": 64},
            "model": {
                "resolution": 64,
                "channels": 32,
                "channel_multipliers": [1, 2, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [],
                "mid_attention": False,
                "z_channels": 64,
                "recompute": False,
                "quantizer": quantizer,
            },
            "loss": {"reconstruction": "l2", "perceptual_weight": 0},
            "discriminator": None,
            "optimizer": {
                "learning_rate": 1e-3,
                "betas": [0.9, 0.99],
                "schedule": "cosine",
                "warmup_steps": 20,
                "final_ratio": 0.02,
            },
            "training": {"steps": 1, "batch_size": 8, "ema_decay": None},
        },
    )


def scenes(split: str, count: int) -> Tensor:
    """(count, 3, 64, 64) in [-1, 1]."""
    dataset = open_dataset(ScenesDataConfig(size=64, num_train=count, num_validation=count), split)
    batch = dataset.batch(range(count), [-1] * count)
    return batch["image"].float() / 127.5 - 1


def run(quantizer: dict[str, Any], seconds: float, train: Tensor, validation: Tensor) -> dict[str, Any]:
    """Figures of one quantizer after `seconds` of training."""
    config = settings(quantizer)

    def steps(count: int, total: int) -> VQTask:
        torch.manual_seed(0)
        task = VQTask(config)
        task.prepare(make_accelerator("auto"), total)
        for step in range(count):
            picks = torch.randint(len(train), (config.training.batch_size,))
            task.train_step([{"image": train[picks].to(task.accelerator.device)}], step)
        return task

    steps(2, 100)
    start = time.perf_counter()
    steps(CALIBRATION_STEPS, 100)
    total = max(int(seconds / (time.perf_counter() - start) * CALIBRATION_STEPS), 1)
    start = time.perf_counter()
    task = steps(total, total)
    taken = time.perf_counter() - start
    figures = task.evaluate({"image": part.to(task.accelerator.device)} for part in validation.split(16))
    return {
        "codes": task.model.spec.codebook_size,
        "steps": total,
        "seconds": round(taken, 1),
        **{name: round(figures[name], 4) for name in ("psnr", "code_usage", "perplexity")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--kinds", nargs="+", choices=QUANTIZERS, default=list(QUANTIZERS), metavar="KIND")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-quantizers"))
    arguments = parser.parse_args()
    facts = (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{arguments.seconds:g} s each, precision: {resolve_precision('auto')}"
    )
    print(facts)
    train, validation = scenes("train", 512), scenes("validation", 128)
    lines = ["| quantizer | codes | steps | PSNR, dB | usage | perplexity |", "|---|---|---|---|---|---|"]
    print(*lines, sep="\n")
    results = {}
    for name in arguments.kinds:
        result = results[name] = run(QUANTIZERS[name], arguments.seconds, train, validation)
        lines.append(
            f"| {name} | {result['codes']} | {result['steps']} | {result['psnr']:.2f} "
            f"| {result['code_usage']:.1%} | {result['perplexity']:.0f} |"
        )
        print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "quantizers.md").write_text(f"{facts}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    values = {"facts": facts, "results": results, "configs": QUANTIZERS}
    (arguments.out / "quantizers.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
