"""Is each condition followed? One small transformer each on the built-in scenes, and what its samples show.

    python benchmarks/conditions.py --tokenizer runs/demo/stage1 [--minutes 3] [--only class ...] [--out DIR]

For every condition the demo's transformer (4 layers of width 256) is trained for `--minutes` on codes of the
tokenizer (64 px, f4) and samples 64 pictures of held-out conditions. The figure says how well they follow;
"shuffled" is the same figure against another sample's condition, which is what a model that ignores its
condition would reach; "real" is that of the held-out scenes themselves as the tokenizer paints them, the
ceiling. What pictures show is read by benchmarks/scene_reader.py. DIR gets conditions.json, conditions.png
and the models.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import print_table
from benchmarks.condition_sheet import Row, condition_sheet
from benchmarks.scene_reader import Reading, SceneReader, painted, train_reader
from stage1_vq import VQModel
from stage1_vq.codes import write_codes
from stage2_ar import ARPipeline
from stage2_ar.config import ARTrainConfig
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.train import train
from taming.config import build_config, load_config
from taming.data.batch import to_device
from taming.data.config import ScenesDataConfig
from taming.data.dataset import ScenesDataset
from taming.data.edges import canny
from taming.data.label_colours import paint_labels
from taming.data.layout_picture import paint_layouts
from taming.data.picture import save_png
from taming.data.scene_objects import OBJECTS
from taming.data.scenes import CLASS_NAMES, FIRST_OBJECT, LABEL_NAMES
from taming.types import Batch

SAMPLES, SHEET = 64, 4
KINDS = range(len(CLASS_NAMES))
SHOWN = 0.015
"""Share of the picture from which on an object counts as shown."""
LOW = 8
"""Pixels of a low resolution's cell: 64 px pictures are told by 8x8."""

Figure = Callable[[Tensor, Reading, Batch], float]
"""(pictures, what is read in them, the batch whose conditions they should follow) -> higher is better."""


@dataclass(frozen=True)
class Case:
    """A condition, how a user gives it, what is measured, and how it is shown."""

    config: dict[str, Any]
    given: Callable[[Batch], dict[str, Any]]
    figure: Figure
    meaning: str
    shown: Callable[[Batch], Tensor | list[str]]
    """Pictures (B, 3, H, W) in [-1, 1], or captions."""
    guidance: float = 1.0
    crop_from: int | None = None
    """Scenes of this size are cropped to 64 px."""


def low_resolution(images: Tensor) -> Tensor:
    return functional.avg_pool2d(images, LOW)


def same_class(images: Tensor, read: Reading, batch: Batch) -> float:
    return float((read.label.argmax(1) == batch["label"]).float().mean())


def same_labels(images: Tensor, read: Reading, batch: Batch) -> float:
    return float((read.labels == batch["segmentation"]).float().mean())


def correlated_depth(images: Tensor, read: Reading, batch: Batch) -> float:
    return correlation(read.depth.flatten(), batch["depth"].flatten())


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((first.double(), second.double())))[0, 1])


def low_resolution_psnr(images: Tensor, read: Reading, batch: Batch) -> float:
    error = (low_resolution(images) - low_resolution(batch["image"])).square().mean()
    return float(10 * torch.log10(4 / error))


def edge_overlap(images: Tensor, read: Reading, batch: Batch) -> float:
    """F1 of edges, one pixel of tolerance."""
    seen, asked = canny(images) > 0, canny(batch["image"]) > 0
    near_seen, near_asked = (functional.max_pool2d(e.float(), 3, 1, 1) > 0 for e in (seen, asked))
    precision = (seen & near_asked).sum() / seen.sum().clamp(min=1)
    recall = (asked & near_seen).sum() / asked.sum().clamp(min=1)
    return float(2 * precision * recall / (precision + recall).clamp(min=1e-9))


def boxes_filled(images: Tensor, read: Reading, batch: Batch) -> float:
    """Share of the boxes of which at least a quarter shows their class."""
    labels, filled = read.labels, []
    height, width = labels.shape[1:]
    for picture, objects in zip(labels, batch["objects"], strict=True):
        for item in objects:
            x0, y0, x1, y1 = item["box"]
            rows = slice(int(y0 * height), max(int(y1 * height), int(y0 * height) + 1))
            columns = slice(int(x0 * width), max(int(x1 * width), int(x0 * width) + 1))
            inside = picture[rows, columns] == FIRST_OBJECT + item["label"]
            filled.append(float(inside.float().mean()) >= 0.25)
    return sum(filled) / len(filled)


def words_shown(images: Tensor, read: Reading, batch: Batch) -> float:
    """Mean of: the leading object is the one named; F1 of the kinds of objects named and shown."""
    shown = torch.stack([(read.labels == FIRST_OBJECT + k).float().mean((1, 2)) for k in KINDS])
    named = torch.tensor([[any(n in text for n in _names(k)) for text in batch["text"]] for k in CLASS_NAMES])
    both = (named & (shown > SHOWN)).sum()
    overlap = 2 * both / (named.sum() + (shown > SHOWN).sum())
    return (same_class(images, read, batch) + float(overlap)) / 2


def _names(kind: str) -> tuple[str, str]:
    return OBJECTS[kind].singular.split()[-1], OBJECTS[kind].plural


def sky_where_high(images: Tensor, read: Reading, batch: Batch) -> float:
    """Minus the correlation of the share of sky with how far down in its scene the crop lies."""
    sky = (read.labels == 0).float().mean(dim=(1, 2))
    return -correlation(sky, batch["crop"][:, 1])


def colours(batch: Batch) -> Tensor:
    return paint_labels(batch["segmentation"])


def nearest_pixels(images: Tensor) -> Tensor:
    return functional.interpolate(images, size=(64, 64)).expand(-1, 3, -1, -1)


def class_names(batch: Batch) -> list[str]:
    return [CLASS_NAMES[label] for label in batch["label"].tolist()]


def places(batch: Batch) -> list[str]:
    return [f"rows {100 * box[1]:.0f} to {100 * box[3]:.0f} %" for box in batch["crop"].tolist()]


def layouts(batch: Batch) -> Tensor:
    return paint_layouts(batch["objects"], (64, 64), CLASS_NAMES)


CASES: dict[str, Case] = {
    "class": Case(
        {"kind": "class", "num_classes": len(CLASS_NAMES)},
        lambda b: {"class": b["label"]}, same_class, "nearest object is the class asked for", class_names,
        guidance=2.0,
    ),
    "segmentation": Case(
        {"kind": "segmentation", "num_labels": len(LABEL_NAMES), "context_layers": 3},
        lambda b: {"segmentation": b["segmentation"]}, same_labels, "pixels that show their label", colours,
    ),
    "depth": Case(
        {"kind": "depth", "context_layers": 3},
        lambda b: {"depth": b["depth"]}, correlated_depth, "correlation of depth",
        lambda b: nearest_pixels(2 * b["depth"] - 1),
    ),
    "low resolution": Case(
        {"kind": "image", "source": "low_resolution", "scale": LOW, "context_layers": 3},
        lambda b: {"image": low_resolution(b["image"])}, low_resolution_psnr,
        "PSNR of the sample made small, dB", lambda b: nearest_pixels(low_resolution(b["image"])),
    ),
    "edges": Case(
        {"kind": "image", "source": "edges", "context_layers": 3},
        lambda b: {"image": b["image"]}, edge_overlap, "F1 of edges",
        lambda b: nearest_pixels(canny(b["image"])),
    ),
    "layout": Case(
        {"kind": "objects", "num_classes": len(CLASS_NAMES)},
        lambda b: {"objects": b["objects"]}, boxes_filled, "boxes that show their class", layouts,
    ),
    "text": Case(
        {"kind": "text", "encoder": {"kind": "words", "max_length": 24}},
        lambda b: {"text": b["text"]}, words_shown, "leading object, and kinds of objects, named",
        lambda b: list(b["text"]), guidance=2.0,
    ),
    "coordinates": Case(
        {"kind": "coordinates"},
        lambda b: {}, sky_where_high, "correlation of sky with height of the crop", places, crop_from=128,
    ),
}  # fmt: skip


def scenes(split: str, count: int, crop_from: int | None) -> ScenesDataset:
    config = ScenesDataConfig(size=64, num_train=count, num_validation=count, crop_from=crop_from)
    return ScenesDataset(config, "train" if split == "train" else "validation")


def settings(codes: Path, condition: dict[str, Any], minutes: float) -> ARTrainConfig:
    """The demo's training with another condition."""
    overrides = [f"data.root={codes}", "training.steps=4000", "training.log_every=200"]
    overrides += [f"training.{name}_every=100000" for name in ("evaluate", "preview", "checkpoint")]
    demo = load_config(ARTrainConfig, "stage2", [*overrides, f"training.minutes={minutes}"], group="demo")
    values = {**demo.model_dump(mode="json"), "condition": condition}
    return build_config(ARTrainConfig, values, source="benchmarks/conditions.py")


def prepare_codes(tokenizer: VQModel, root: Path, crop_from: int | None) -> tuple[Path, ScenesDataset]:
    """Codes of 4000 scenes, made once, and the held-out scenes."""
    held_out = scenes("validation", 256, crop_from)
    folder = root / ("codes" if crop_from is None else f"codes-crop-{crop_from}")
    if not (folder / "index.json").is_file():
        data = {"train": scenes("train", 4000, crop_from), "validation": held_out}
        views = 1 if crop_from is None else 4
        write_codes(tokenizer, data, folder, batch_size=32, views=views, keep=("image",))
    return folder, held_out


def rolled(batch: Batch) -> Batch:
    """Every sample with the conditions of the one before."""
    return {
        name: value.roll(1, 0) if isinstance(value, Tensor) else [value[-1], *value[:-1]]
        for name, value in batch.items()
    }


def measure(case: Case, reader: SceneReader, images: Tensor, batch: Batch) -> tuple[float, float]:
    """The figure of pictures against their own conditions and against each other's."""
    with torch.no_grad():
        read = reader(images)
    return case.figure(images, read, batch), case.figure(images, read, rolled(batch))


def crops_of(pipe: ARPipeline, batch: Batch) -> Tensor:
    """Samples that lie where the crops of `batch` do; a pipeline's call paints whole pictures."""
    grid, count = pipe.model.config.grid, len(batch["crop"])
    prefix = pipe.model.condition({"crop": batch["crop"]}, grid)
    uniforms = picture_uniforms(0, 0, count, grid[0] * grid[1])
    return pipe.decode(sample_codes(pipe.model.transformer, prefix, None, grid, uniforms, SamplingSettings()))


def run_case(
    name: str, case: Case, tokenizer: VQModel, reader: SceneReader, root: Path, minutes: float
) -> tuple[dict[str, Any], Row]:
    codes, held_out = prepare_codes(tokenizer, root, case.crop_from)
    run = root / name.replace(" ", "_")
    begin = time.perf_counter()
    result = train(settings(codes, case.config, minutes), run)
    seconds = time.perf_counter() - begin
    pipe = ARPipeline.from_pretrained(result.model)
    # Random crops where the data makes them: all centre crops say the same.
    epoch = -1 if case.crop_from is None else 0
    batch = to_device(held_out.batch(range(SAMPLES), [epoch] * SAMPLES), "cpu")
    if case.crop_from is None:
        images = pipe(case.given(batch), batch_size=32, guidance_scale=case.guidance).images
    else:
        images = crops_of(pipe, batch)
    followed, shuffled = measure(case, reader, images, batch)
    ceiling, _ = measure(case, reader, painted(tokenizer, batch["image"]), batch)
    facts = {
        "condition": name, "figure": case.meaning, "followed": followed, "shuffled": shuffled,
        "guidance": case.guidance, "real": ceiling, "bits_per_code": result.figures["bits_per_code"],
        "steps": result.steps, "seconds": seconds,
    }  # fmt: skip
    chosen = batch["image"][:SHEET]
    shown = case.shown(batch)
    return facts, Row(name, shown[:SHEET], images[:SHEET], chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a 64 px tokenizer of the scenes")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--reader-seconds", type=float, default=120.0)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("runs/conditions"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = VQModel.from_pretrained(arguments.tokenizer)
    kept = arguments.out / "reader.pt"
    reader = SceneReader().eval()
    if kept.is_file():
        reader.load_state_dict(torch.load(kept, weights_only=True))
    else:
        reader = train_reader(tokenizer, scenes("train", 3000, None), arguments.reader_seconds)
        torch.save(reader.state_dict(), kept)
    facts: list[dict[str, Any]] = []
    rows: list[Row] = []
    for name in arguments.only:
        fact, row = run_case(name, CASES[name], tokenizer, reader, arguments.out, arguments.minutes)
        facts.append(fact)
        rows.append(row)
        (arguments.out / "conditions.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        save_png(condition_sheet(rows), arguments.out / "conditions.png")
    columns = ["condition", "figure", "guidance", "followed", "shuffled", "real", "bits/code", "steps", "s"]
    table = [
        [
            fact["condition"], fact["figure"], f"{fact['guidance']:.1f}", f"{fact['followed']:.3f}",
            f"{fact['shuffled']:.3f}",
            f"{fact['real']:.3f}", f"{fact['bits_per_code']:.2f}", str(fact["steps"]),
            f"{fact['seconds']:.0f}",
        ]
        for fact in facts
    ]  # fmt: skip
    print_table("Conditions on held-out scenes", columns, table)


if __name__ == "__main__":
    main()
