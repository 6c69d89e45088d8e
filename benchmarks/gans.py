"""The four GAN systems and the two-stage one for the same time: the scenes at 32 px, by class.

    python benchmarks/gans.py [--minutes 6] [--at-once 1] [--systems NAME ...] [--out FOLDER]

Each trains in a process of its own, on one thread: the GANs by configs/gan/NAME_small.yaml, the two-stage
system by the configs below (an f4 tokenizer of 8x8 codes and a transformer that is told the class). Runs that
are in FOLDER already are not made again. Then all are measured one after the other: 1000 samples against 1000
validation scenes by their feature distance (also that of the untrained model: what it began with), the sliced
Wasserstein distance of their patches, and whether a classifier of the scenes names the class asked for.
Writes FOLDER/gans.md, gans.json and gans.png, a sheet with a row of each.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The script's own folder comes first in the path, and finds the rest.
from gan_runs import (
    drawn,
    facts,
    make_runs,
    read,
    run_folder,
    steps_made,
    stopped_after,
    table,
    train_for,
    written,
)
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.codes import write_codes
from stage1_vq.config import VQTrainConfig
from stage1_vq.train import train as train_tokenizer
from stage2_ar import ARPipeline
from stage2_ar.config import ARTrainConfig
from stage2_ar.model import ARModel
from stage2_ar.task import model_config as ar_model_config
from stage2_ar.train import filled_in
from stage2_ar.train import train as train_transformer
from taming.config import build_config, load_config
from taming.data.config import ScenesDataConfig
from taming.data.picture import save_png
from taming.data.scenes import CLASS_NAMES
from taming.gan.config import GANTrainConfig
from taming.gan.model import GANModel
from taming.gan.sheet import captioned_rows
from taming.gan.task import model_config
from taming.metrics.feature_distance import feature_distance
from taming.metrics.sliced_wasserstein import SlicedWasserstein
from taming.metrics.told_apart import PictureClassifier, told_apart, train_classifier

GANS = ("sagan", "transgan", "vitgan", "stransgan")
TWO_STAGE = "two-stage"
DATA = {"kind": "scenes", "size": 32, "num_train": 8000, "num_validation": 256}
STAGE_ONE_SHARE, STAGE_TWO_SHARE = 0.35, 0.58
MEASURED, SHOWN = 1000, 12
NEVER, MANY = 10**6, 40_000
TOKENIZER: dict[str, Any] = {
    "data": {**DATA, "flip": True},
    "model": {
        "resolution": 32,
        "channels": 32,
        "channel_multipliers": [1, 2, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "mid_attention": True,
        "z_channels": 64,
        "recompute": False,
        "quantizer": {
            "kind": "nearest",
            "codebook_size": 512,
            "code_dim": 8,
            "l2_normalised": True,
            "kmeans_init": True,
            "revive_after": 100,
        },
    },
    "loss": {"reconstruction": "l2", "perceptual_weight": 0},
    "discriminator": {
        "network": {"kind": "patchgan", "channels": 32, "num_layers": 2},
        "loss": "hinge",
        "weight": 0.2,
        "start_step": MANY * 2 // 3,
        "warmup_steps": MANY // 25,
        "ramp_steps": MANY // 25,
    },
    "optimizer": {
        "learning_rate": 1e-3,
        "betas": [0.9, 0.99],
        "schedule": "cosine",
        "warmup_steps": MANY // 40,
        "final_ratio": 0.02,
    },
    "training": {
        "steps": MANY,
        "batch_size": 16,
        "ema_decay": 0.99,
        "log_every": 50,
        "evaluate_every": NEVER,
        "preview_every": NEVER,
        "checkpoint_every": NEVER,
        "evaluation_pictures": 64,
    },
}
TRANSFORMER: dict[str, Any] = {
    "transformer": {"kind": "llama", "num_layers": 4, "num_heads": 4, "width": 192, "qk_norm": False},
    "condition": {"kind": "class", "num_classes": 5, "dropout": 0.1},
    "optimizer": {
        "method": "muon",
        "learning_rate": 3e-3,
        "betas": [0.9, 0.95],
        "weight_decay": 0.05,
        "schedule": "cosine",
        "warmup_steps": MANY // 16,
        "final_ratio": 0.02,
    },
    "training": {
        "steps": MANY,
        "batch_size": 32,
        "ema_decay": 0.99,
        "log_every": 50,
        "evaluate_every": NEVER,
        "preview_every": NEVER,
        "checkpoint_every": NEVER,
        "evaluation_pictures": 64,
    },
}
Sampler = Callable[[list[int], int], Tensor]
"""(classes, seed) -> pictures (N, 3, 32, 32) in [-1, 1]."""


def gan_config(name: str) -> GANTrainConfig:
    return load_config(
        GANTrainConfig, f"{name}_small", [f"data.{k}={v}" for k, v in DATA.items()], group="gan"
    )


def tokenizer_config(minutes: float | None = None) -> VQTrainConfig:
    training = {**TOKENIZER["training"], "minutes": minutes}
    return build_config(VQTrainConfig, {**TOKENIZER, "training": training})


def transformer_config(codes: Path, minutes: float | None = None) -> ARTrainConfig:
    values = {**TRANSFORMER, "data": {"kind": "codes", "root": str(codes)}}
    return build_config(
        ARTrainConfig, {**values, "training": {**TRANSFORMER["training"], "minutes": minutes}}
    )


def train_two_stages(folder: Path, minutes: float) -> dict[str, Any]:
    """Tokenizer, codes and transformer, together in `minutes`."""
    config = tokenizer_config(STAGE_ONE_SHARE * minutes)
    splits = drawn(config.data, "train"), drawn(config.data, "validation")
    begin = time.perf_counter()
    with stopped_after(60 * STAGE_ONE_SHARE * minutes * 1.15):
        train_tokenizer(config, folder / "stage1", resume="never", splits=splits)
    if not (folder / "stage1" / "model").is_dir():  # stopped in the last evaluation
        train_tokenizer(config, folder / "stage1", splits=splits)
    tokenizer = VQModel.from_pretrained(folder / "stage1")
    write_codes(tokenizer, {"train": splits[0], "validation": splits[1]}, folder / "codes", batch_size=64)
    left = max(60 * minutes - (time.perf_counter() - begin), 1.0)
    transformer = transformer_config(folder / "codes", min(STAGE_TWO_SHARE * minutes, 0.95 * left / 60))
    with stopped_after(left):
        train_transformer(transformer, folder / "stage2", resume="never")
    if not (folder / "stage2" / "model").is_dir():
        train_transformer(transformer, folder / "stage2")
    seconds = time.perf_counter() - begin
    pipe = ARPipeline.from_pretrained(folder / "stage2")
    counts = [sum(weight.numel() for weight in module.parameters()) for module in (tokenizer, pipe.model)]
    return written(
        folder,
        {
            "seconds": seconds,
            "steps": steps_made(folder / "stage1") + steps_made(folder / "stage2"),
            "steps_of_stages": [steps_made(folder / "stage1"), steps_made(folder / "stage2")],
            "parameters": sum(counts),
            "parameters_of_stages": counts,
        },
    )


def sampler(name: str, folder: Path) -> Sampler:
    """Of the trained system."""
    if name == TWO_STAGE:
        return _of_pipeline(ARPipeline.from_pretrained(folder / "stage2"))
    return _of_gan(GANModel.from_pretrained(folder / "run"))


def untrained(name: str, folder: Path) -> Sampler:
    """Of the same system before its first step."""
    torch.manual_seed(0)
    if name != TWO_STAGE:
        config = gan_config(name)
        return _of_gan(GANModel(model_config(config, CLASS_NAMES)).eval())
    tokenizer = VQModel(tokenizer_config().model).eval()
    config_of_codes = filled_in(transformer_config(folder / "codes"))
    model = ARModel(ar_model_config(config_of_codes, tokenizer, (32, 32))).eval()
    return _of_pipeline(ARPipeline(model, tokenizer))


def _of_gan(model: GANModel) -> Sampler:
    return lambda classes, seed: model.sample(len(classes), seed=seed, classes=classes, batch_size=32)


def _of_pipeline(pipe: ARPipeline) -> Sampler:
    return lambda classes, seed: (
        pipe({"class": torch.tensor(classes)}, num_images=1, seed=seed, batch_size=64).images
    )


def measure(
    name: str, folder: Path, real: Tensor, labels: Tensor, judge: PictureClassifier
) -> dict[str, Any]:
    """Figures of `len(real)` samples of the classes of `real`."""
    before = feature_distance(real, untrained(name, folder)(labels.tolist(), 0))
    paint = sampler(name, folder)
    paint([0], 1)
    begin = time.perf_counter()
    images = paint(labels.tolist(), 0)
    seconds = time.perf_counter() - begin
    after = feature_distance(real, images)
    patches = SlicedWasserstein((32, 32))
    patches.add_real(real)
    patches.add_generated(images)
    judged = told_apart(judge, [(real, labels)], [(images, labels)])
    return {
        "feature_distance_start": before,
        "feature_distance": after,
        "ratio": after / before,
        "patch_distance": patches.value()["mean"],
        **judged.figures(),
        "class_accuracy_of_each": dict(zip(CLASS_NAMES, judged.of_class, strict=True)),
        "samples_per_second": len(images) / seconds,
    }


def measured(names: list[str], out: Path) -> dict[str, dict[str, Any]]:
    """Figures of every run that is made; those that were measured before are read."""
    made = {name: found for name in names if (found := read(run_folder(out, name))) is not None}
    if all("ratio" in found for found in made.values()):
        return made
    validation = drawn(ScenesDataConfig(size=32, num_validation=2 * MEASURED), "validation")
    batch = validation.batch(range(2 * MEASURED), [-1] * (2 * MEASURED))
    scenes, labels = batch["image"].float() / 127.5 - 1, batch["label"]
    real, labels = scenes[:MEASURED], labels[:MEASURED]
    judge = train_classifier(drawn(gan_config("sagan").data, "train"))
    patches = SlicedWasserstein((32, 32))
    patches.add_real(real)
    patches.add_generated(scenes[MEASURED:])
    other = {
        "feature_distance": feature_distance(real, scenes[MEASURED:]),
        "patch_distance": patches.value()["mean"],
        "class_accuracy": told_apart(judge, [(real, labels)], [(real, labels)]).class_accuracy_real,
    }
    written(out / "runs" / "real", other)
    for name, found in made.items():
        folder = run_folder(out, name)
        made[name] = written(folder, {**found, **measure(name, folder, real, labels, judge)})
        print(f"{name}: {made[name]['feature_distance']:.2f} of {made[name]['feature_distance_start']:.2f}")
    return made


def report(found: dict[str, dict[str, Any]], out: Path, said: str) -> None:
    """Table, figures and sheet."""
    rows: dict[str, Any] = {"real scenes": read(out / "runs" / "real"), **found}
    told: dict[str, Callable[[Any], str]] = {
        "parameters": lambda row: f"{row['parameters']:,}",
        "steps": lambda row: " + ".join(map(str, row.get("steps_of_stages", [row["steps"]]))),
        "seconds": lambda row: f"{row['seconds']:.0f}",
        "distance at start": lambda row: f"{row['feature_distance_start']:.2f}",
        "at end": lambda row: f"{row['feature_distance']:.2f}",
        "ratio": lambda row: f"{row['ratio']:.3f}",
        "patches": lambda row: f"{row['patch_distance']:.0f}",
        "class told": lambda row: f"{row['class_accuracy']:.1%}",
        "samples/s": lambda row: f"{row['samples_per_second']:.1f}",
    }

    def cell(tell: Callable[[Any], str]) -> Callable[[str, Any], str]:
        def of_row(_: str, row: Any) -> str:
            try:
                return tell(row)
            except KeyError:  # real pictures have no steps
                return ""

        return of_row

    text = table({"system": lambda name, _: name, **{k: cell(v) for k, v in told.items()}}, rows)
    (out / "gans.md").write_text(f"{said}\n\n{text}", encoding="utf-8")
    values = {"facts": said, "systems": rows, "tokenizer": TOKENIZER, "transformer": TRANSFORMER}
    (out / "gans.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text)
    save_png(sheet(found, out), out / "gans.png")
    print(f"{out / 'gans.md'}, {out / 'gans.json'}, {out / 'gans.png'}")


def sheet(found: dict[str, dict[str, Any]], out: Path) -> Tensor:
    """A row of each, the classes in turn."""
    validation = drawn(ScenesDataConfig(size=32, num_validation=200), "validation")
    batch = validation.batch(range(200), [-1] * 200)
    names, classes = CLASS_NAMES, [n % 5 for n in range(SHOWN)]
    left = {number: iter((batch["label"] == number).nonzero().flatten().tolist()) for number in range(5)}
    places = [next(left[number]) for number in classes]
    rows = [(f"real scenes: {', '.join(names)}, in turn", batch["image"][places].float() / 127.5 - 1)]
    for name, figures in found.items():
        caption = (
            f"{name}: {figures['seconds'] / 60:.1f} minutes, class told {figures['class_accuracy']:.0%}, "
            f"feature distance {figures['feature_distance_start']:.1f} to {figures['feature_distance']:.2f}"
        )
        rows.append((caption, sampler(name, run_folder(out, name))(classes, 1)))
    return captioned_rows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    systems = [*GANS, TWO_STAGE]
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--at-once", type=int, default=1, choices=(1, 2), help="runs side by side")
    parser.add_argument("--systems", nargs="+", choices=systems, default=systems, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gans"))
    parser.add_argument("--run", choices=systems, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if arguments.run == TWO_STAGE:
        train_two_stages(run_folder(out, TWO_STAGE), arguments.minutes)
    elif arguments.run:
        train_for(gan_config(arguments.run), run_folder(out, arguments.run), arguments.minutes)
    else:
        torch.set_num_threads(1)
        script = Path(__file__).resolve()
        make_runs(
            script, arguments.systems, out, minutes=arguments.minutes, at_once=arguments.at_once, say=print
        )
        report(measured(arguments.systems, out), out, facts(arguments.minutes, arguments.at_once))


if __name__ == "__main__":
    main()
