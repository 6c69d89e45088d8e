"""The whole way of a picture once: both stages on the built-in scenes, and a sheet to look at.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.codes import write_codes
from stage1_vq.config import VQTrainConfig
from stage1_vq.evaluate import evaluate_tokenizer, reconstruct
from stage1_vq.train import train as train_tokenizer
from stage2_ar import ARPipeline
from stage2_ar.config import ARTrainConfig
from stage2_ar.evaluate import followed
from stage2_ar.sheet import contact_sheet
from stage2_ar.train import train as train_transformer
from taming.config import load_config
from taming.data.config import ScenesDataConfig
from taming.data.dataset import PictureDataset, ScenesDataset, open_dataset
from taming.data.picture import save_png
from taming.errors import UserError

# Shares of the time that goes into training; sampling and evaluation take what is left.
STAGE_ONE_SHARE, STAGE_TWO_SHARE = 0.40, 0.45
ADHERENCE_MAPS, SHEET_MAPS, SAMPLES_PER_MAP = 64, 4, 4
WIDE_PIXELS = 256


@dataclass(frozen=True)
class DemoFigures:
    """What the demo measures on held-out scenes; metrics.json holds it."""

    psnr: float
    code_usage: float
    perplexity: float
    bits_per_code: float
    adherence: float
    adherence_shuffled: float
    adherence_of_real: float
    seconds: float
    stage1_steps: int
    stage2_steps: int


def run_demo(out: Path, *, minutes: float, console: Console) -> DemoFigures:
    """Train both stages, sample, measure, and write `out`/contact_sheet.png and `out`/metrics.json.

    `minutes` bounds the whole: a machine that is slower than two usual cores trains for fewer steps.
    Raises UserError where `out` holds something else than an earlier demo.
    """
    begin = time.perf_counter()
    _clear(out)

    console.rule("stage one: pictures to codes and back")
    vq_config = load_config(VQTrainConfig, "stage1", [_within(STAGE_ONE_SHARE * minutes)], group="demo")
    scenes, held_out = open_dataset(vq_config.data, "train"), open_dataset(vq_config.data, "validation")
    assert isinstance(held_out, ScenesDataset)
    trained = train_tokenizer(vq_config, out / "stage1", splits=(scenes, held_out))
    tokenizer = VQModel.from_pretrained(trained.model)
    survival = evaluate_tokenizer(tokenizer, held_out, batch_size=32).figures
    write_codes(tokenizer, {"train": scenes, "validation": held_out}, out / "codes", batch_size=32)

    console.rule("stage two: a label map to codes")
    overrides = [f"data.root={out / 'codes'}", _within(STAGE_TWO_SHARE * minutes)]
    ar_config = load_config(ARTrainConfig, "stage2", overrides, group="demo")
    result = train_transformer(ar_config, out / "stage2")
    pipe = ARPipeline.from_pretrained(result.model)

    console.rule("samples")
    real, maps = _pictures(held_out, ADHERENCE_MAPS)
    samples = pipe({"segmentation": maps}, batch_size=32).images
    adherence, shuffled = followed(samples, maps, held_out.prototypes)
    sheet = _sheet(pipe, tokenizer, held_out)
    save_png(sheet, out / "contact_sheet.png")
    figures = DemoFigures(
        psnr=survival["psnr"],
        code_usage=survival["code_usage"],
        perplexity=survival["perplexity"],
        bits_per_code=result.figures["bits_per_code"],
        adherence=adherence,
        adherence_shuffled=shuffled,
        adherence_of_real=followed(real, maps, held_out.prototypes)[0],
        seconds=time.perf_counter() - begin,
        stage1_steps=trained.steps,
        stage2_steps=result.steps,
    )
    (out / "metrics.json").write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
    console.print(_table(figures))
    console.print(f"look at {out / 'contact_sheet.png'}", highlight=False)
    return figures


def _clear(out: Path) -> None:
    """Remove an earlier demo, and nothing else."""
    if not out.exists():
        out.mkdir(parents=True)
        return
    ours = {"stage1", "stage2", "codes", "contact_sheet.png", "metrics.json"}
    if not out.is_dir() or (others := sorted({path.name for path in out.iterdir()} - ours)):
        what = f"holds {others[0]}" if out.is_dir() else "is a file"
        raise UserError(f"{out} {what}, which is not the demo's; give --out another folder")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _within(minutes: float) -> str:
    return f"training.minutes={minutes}"


def _pictures(scenes: PictureDataset, count: int) -> tuple[Tensor, Tensor]:
    """The first pictures (B, 3, H, W) in [-1, 1] and their label maps (B, H, W)."""
    batch = scenes.batch(range(count), [-1] * count)
    return batch["image"].float() / 127.5 - 1, batch["segmentation"]


def _sheet(pipe: ARPipeline, tokenizer: VQModel, held_out: ScenesDataset) -> Tensor:
    images, maps = _pictures(held_out, 8)
    with torch.no_grad():
        reconstructions = reconstruct(tokenizer, images)[1]
    shown = maps[:SHEET_MAPS]
    samples = pipe({"segmentation": shown}, num_images=SAMPLES_PER_MAP, seed=1).images
    height = held_out.size[0]
    wide = ScenesDataset(
        ScenesDataConfig(seed=held_out.config.seed, num_validation=1, size=[height, WIDE_PIXELS]),
        "validation",
    )
    _, wide_map = _pictures(wide, 1)
    panorama = pipe({"segmentation": wide_map}, height=height, width=WIDE_PIXELS, seed=2).images
    return contact_sheet(images, reconstructions, shown, samples, wide_map, panorama)


def _table(figures: DemoFigures) -> Table:
    table = Table("figure", "value", "what it is", title="on held-out scenes", title_justify="left")
    meanings = {
        "psnr": "dB, pictures against their reconstructions",
        "code_usage": "share of the codebook in use",
        "perplexity": "as many equally likely codes",
        "bits_per_code": "the transformer's, given the map; less is better",
        "adherence": "share of pixels that show the label asked for, in samples",
        "adherence_shuffled": "the same against another sample's map: the control",
        "adherence_of_real": "the same for real scenes: the ceiling",
        "seconds": "for all of this",
        "stage1_steps": "of training the tokenizer",
        "stage2_steps": "of training the transformer",
    }
    for name, value in asdict(figures).items():
        table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value), meanings[name])
    return table
