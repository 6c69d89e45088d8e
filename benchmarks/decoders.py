"""Every kind of decoder with every kind of discriminator in stage one, for the same time each.

    python benchmarks/decoders.py [--minutes 2] [--at-once 2] [--out DIR] [--decoders cnn ...]
                                  [--discriminators patchgan ...]

Each pair trains for so many minutes of wall clock on the built-in scenes (32 px, f4, 256 codes) in a process
of one thread, behind the same encoder and codebook, with the adaptive weight; the discriminator learns from a
quarter of the steps on and is heard from three tenths on. The figures are of 256 held-out scenes, with the
averaged weights. What is measured: PSNR and its distance from the CNN with PatchGAN, which is to be within 3
dB; SSIM; the share of codes in use; the distance of the reconstructions from the scenes in the features of
taming.metrics.feature_distance; steps. A pair whose result is in DIR is not trained again. DIR gets
decoders.json, decoders.md and decoders.png; `--summary` writes them from what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stage1_vq import VQModel
from stage1_vq.config import VQTrainConfig
from stage1_vq.evaluate import evaluate_tokenizer
from stage1_vq.train import train
from taming.config import build_config
from taming.data.config import ScenesDataConfig
from taming.data.dataset import ScenesDataset, open_dataset
from taming.data.picture import save_png, to_uint8
from taming.errors import UserError
from taming.metrics.feature_distance import feature_distance

DECODERS: dict[str, dict[str, Any]] = {
    "cnn": {"kind": "cnn"},
    "sagan": {
        "kind": "sagan",
        "channels": 32,
        "multipliers": [3, 2, 1],
        "norm": "group",
        "attention": {"resolutions": [16]},
    },
    "transgan": {
        "kind": "transgan",
        "widths": [128, 128, 32],
        "depths": [2, 1, 1],
        "window": 8,
        "window_from": 32,
        "token_noise": False,
    },
    "vitgan": {
        "kind": "vitgan",
        "width": 128,
        "num_heads": 4,
        "depth": 3,
        "mlp_ratio": 2,
        "linear": "plain",
        "style_dim": 64,
        "implicit_width": 128,
    },
    "stransgan": {"kind": "stransgan", "widths": [128, 128, 64, 32], "depths": [1, 2, 1, 1]},
}
DISCRIMINATORS: dict[str, dict[str, Any]] = {
    "patchgan": {"network": {"kind": "patchgan", "channels": 32, "num_layers": 2}},
    "sagan": {
        "network": {
            "kind": "sagan",
            "channels": 16,
            "multipliers": [2, 2, 2],
            "num_halvings": 2,
            "head": "map",
            "attention": {"resolutions": [16]},
        }
    },
    "transgan": {
        "network": {"kind": "transgan", "patch_widths": [48, 16], "depths": [1, 1], "head": "tokens"}
    },
    "vitgan": {"network": {"kind": "vitgan", "width": 64, "num_heads": 4, "depth": 2, "mlp_ratio": 2}},
    "stransgan": {"network": {"kind": "stransgan", "widths": [32, 64], "depths": [2, 2], "head": "tokens"}},
}
HELD_OUT, SHOWN = 256, 4
BAR = 3.0
"""dB below the CNN with PatchGAN that a pair may be."""
REFERENCE = "cnn-patchgan"
DATA: dict[str, Any] = {"kind": "scenes", "size": 32, "num_train": 8000, "num_validation": HELD_OUT}


def settings(decoder: str, discriminator: str, minutes: float) -> VQTrainConfig:
    """The training of a pair."""
    steps = 20000  # more than fit into the time, which decides
    return build_config(
        VQTrainConfig,
        {
            "data": DATA | {"flip": True},
            "model": {
                "resolution": 32,
                "channels": 32,
                "channel_multipliers": [1, 2, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [],
                "mid_attention": False,
                "z_channels": 32,
                "quantizer": {
                    "kind": "nearest",
                    "codebook_size": 256,
                    "code_dim": 8,
                    "l2_normalised": True,
                    "kmeans_init": True,
                    "revive_after": 100,
                },
                "decoder": DECODERS[decoder],
            },
            "loss": {"perceptual_weight": 0},
            "discriminator": {
                "weight": 0.1,
                "start_step": round(0.25 * steps),
                "warmup_steps": round(0.05 * steps),
                "ramp_steps": round(0.05 * steps),
                **DISCRIMINATORS[discriminator],
            },
            "optimizer": {
                "learning_rate": 1e-3,
                "betas": [0.5, 0.99],
                "schedule": "cosine",
                "warmup_steps": round(0.02 * steps),
                "final_ratio": 0.02,
            },
            "training": {
                "steps": steps,
                "minutes": minutes,
                "batch_size": 8,
                "ema_decay": 0.99,
                "precision": "fp32",
                "log_every": 50,
                "evaluate_every": steps,
                "preview_every": steps,
                "checkpoint_every": steps,
            },
        },
    )


def run_pair(decoder: str, discriminator: str, minutes: float, out: Path) -> None:
    """Train one pair and write its figures and reconstructions into `out`."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    facts: dict[str, Any] = {"decoder": decoder, "discriminator": discriminator, "minutes": minutes}
    try:
        result = train(settings(decoder, discriminator, minutes), out / "run", resume="never")
    except UserError as error:
        if "diverged" not in str(error):
            raise
        facts |= {"finite": False, "problem": str(error)}
    else:
        model = VQModel.from_pretrained(result.model)
        facts |= {"finite": True, "steps": result.steps, **figures(model), "notes": list(result.notes)}
        facts["decoder_parameters"] = sum(p.numel() for p in model.decoder.parameters())
        painted = reconstructions(model, scenes(SHOWN))
        np.save(out / "reconstructions.npy", painted.numpy())
    facts["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "result.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def figures(model: VQModel) -> dict[str, float]:
    """Of the held-out scenes: psnr, ssim, code_usage, feature_distance."""
    dataset = open_dataset(ScenesDataConfig(**{k: v for k, v in DATA.items() if k != "kind"}), "validation")
    found = evaluate_tokenizer(model, dataset).figures
    real = scenes(HELD_OUT)
    kept = {name: round(found[name], 4) for name in ("psnr", "ssim", "code_usage")}
    return kept | {"feature_distance": round(feature_distance(real, reconstructions(model, real)), 4)}


def scenes(count: int) -> Tensor:
    """The first `count` held-out scenes, (count, 3, 32, 32) in [-1, 1]."""
    dataset = ScenesDataset(ScenesDataConfig(**{k: v for k, v in DATA.items() if k != "kind"}), "validation")
    return dataset.batch(range(count), [-1] * count)["image"].float() / 127.5 - 1


@torch.no_grad()
def reconstructions(model: VQModel, images: Tensor) -> Tensor:
    return model.decode(model.encode(images)).clamp(-1, 1)


def summarise(out: Path, decoders: list[str], discriminators: list[str]) -> list[dict[str, Any]]:
    """Write decoders.json, decoders.md and decoders.png of the pairs that are done; their results."""
    results: dict[str, dict[str, Any]] = {}
    for decoder, discriminator in product(decoders, discriminators):
        name = f"{decoder}-{discriminator}"
        if (out / name / "result.json").is_file():
            results[name] = json.loads((out / name / "result.json").read_text(encoding="utf-8"))
    reference = results.get(REFERENCE, {}).get("psnr", math.nan)
    for result in results.values():
        difference = result.get("psnr", math.nan) - reference
        result["difference"] = round(difference, 2) if math.isfinite(difference) else None
        result["meets_the_bar"] = bool(result["finite"] and difference >= -BAR)
    lines = [
        "| decoder | discriminator | PSNR, dB | to cnn + patchgan | SSIM | code usage | feature distance "
        "| decoder weights | steps | finite | within 3 dB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_line, results.values()),
    ]
    facts = f"torch {torch.__version__}, one thread a pair, scenes at 32 px, f4"
    (out / "decoders.md").write_text(f"{facts}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "facts": facts,
        "decoders": DECODERS,
        "discriminators": DISCRIMINATORS,
        "results": list(results.values()),
    }
    (out / "decoders.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    save_png(sheet(results, out, decoders, discriminators), out / "decoders.png")
    print(*lines, sep="\n", flush=True)
    return list(results.values())


def _line(result: dict[str, Any]) -> str:
    head = f"| {result['decoder']} | {result['discriminator']} "
    if not result["finite"]:
        return head + "| - | - | - | - | - | - | - | no | no |"
    away, met = "-", "-"
    if result["difference"] is not None:
        away, met = f"{result['difference']:+.2f}", "yes" if result["meets_the_bar"] else "no"
    return head + (
        f"| {result['psnr']:.2f} | {away} | {result['ssim']:.3f} | {result['code_usage']:.0%} "
        f"| {result['feature_distance']:.4f} | {result['decoder_parameters']:,} | {result['steps']} | yes "
        f"| {met} |"
    )


SCALE, GAP, CAPTION = 3, 10, 20


def sheet(
    results: dict[str, dict[str, Any]], out: Path, decoders: list[str], discriminators: list[str]
) -> Tensor:
    """The scenes above, then a row a decoder and a column a discriminator: (3, H, W) in [-1, 1]."""
    side = 32 * SCALE
    width, height = SHOWN * side, side + CAPTION
    canvas = Image.new(
        "RGB",
        (len(discriminators) * (width + GAP) + GAP, (len(decoders) + 1) * (height + GAP) + GAP),
        "white",
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)

    def place(pictures: Tensor, caption: str, row: int, column: int) -> None:
        left, top = GAP + column * (width + GAP), GAP + row * (height + GAP)
        draw.text((left, top), caption, fill="black", font=font)
        line = rearrange(to_uint8(pictures), "n c h w -> h (n w) c").numpy()
        enlarged = Image.fromarray(line).resize((width, side), Image.Resampling.NEAREST)
        canvas.paste(enlarged, (left, top + CAPTION))

    place(scenes(SHOWN), "held-out scenes", 0, 0)
    for row, decoder in enumerate(decoders, 1):
        for column, discriminator in enumerate(discriminators):
            name = f"{decoder}-{discriminator}"
            if not results.get(name, {}).get("finite"):
                continue
            painted = torch.from_numpy(np.load(out / name / "reconstructions.npy"))
            caption = f"{decoder} decoder, {discriminator}: {results[name]['psnr']:.1f} dB"
            place(painted, caption, row, column)
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w").float() / 127.5 - 1


def run_all(pairs: list[tuple[str, str]], minutes: float, at_once: int, out: Path) -> None:
    """Train what is not done yet, each pair in a process of one thread, `at_once` at a time."""
    waiting = [pair for pair in pairs if not (out / "-".join(pair) / "result.json").is_file()]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    failed = []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                decoder, discriminator = waiting.pop(0)
                folder = out / f"{decoder}-{discriminator}"
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, __file__, "--one", decoder, discriminator]
                command += ["--minutes", str(minutes), "--out", str(out)]
                with (folder / "output.txt").open("wb") as log:
                    child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                running.append((folder.name, child))
            time.sleep(0.5)
            for name, child in [entry for entry in running if entry[1].poll() is not None]:
                running.remove((name, child))
                if child.returncode:
                    failed.append(name)
                print(f"{name}: {'failed' if child.returncode else 'done'}", flush=True)
    finally:
        for _, child in running:
            child.terminate()
    if failed:
        print(f"failed: {', '.join(failed)}; see output.txt in their folders", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-decoders"))
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS))
    parser.add_argument("--discriminators", nargs="+", choices=DISCRIMINATORS, default=list(DISCRIMINATORS))
    parser.add_argument("--summary", action="store_true", help="only put together what is done")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        decoder, discriminator = arguments.one
        run_pair(decoder, discriminator, arguments.minutes, arguments.out / f"{decoder}-{discriminator}")
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.summary:
        pairs = list(product(arguments.decoders, arguments.discriminators))
        run_all(pairs, arguments.minutes, arguments.at_once, arguments.out)
    summarise(arguments.out, arguments.decoders, arguments.discriminators)


if __name__ == "__main__":
    main()
