"""Large scenes by a 64 px model: seams of the sliding window, and of windowed attention.

    python benchmarks/seams.py TOKENIZER [--start PIPELINE] [--minutes 5] [--out runs/seams] [--stride 1 8]
                               [--windows 4,4 8,8 15,15 --window-minutes 1]

TOKENIZER is one of 64 px scenes, the demo's runs/demo/stage1. Two transformers of one size are trained on the
codes of 64 px scenes, and of 64 px crops of larger ones, with the label map as an aligned condition: one
attends to all before, and slides; the other has an attention window. With --start (the demo's
runs/demo/stage2) both begin with its weights. Held-out label maps of 64x256 and 256x256 pixels are sampled by
both. Figures are those of taming.metrics.seams, alone and beside the real pictures of the same maps, +- one
standard error: 1.00 is no seam. "window" counts multiples of the trained window, where one picture trained
on would end, columns and rows; "moves" the columns at which a window that rests moves on (of a stride above
1); F is `periodicity` with the trained window's width. Squares are slid with the last stride only, for their
4096 cells take long. sheet.png is to be looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import print_table
from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.config import ARTrainConfig
from stage2_ar.sampling.sliding_window import place_windows
from stage2_ar.train import train
from stage2_ar.transformer import code_log_likelihood
from taming.config import load_config
from taming.data.config import ScenesDataConfig
from taming.data.dataset import PictureDataset, ScenesDataset
from taming.data.label_colours import paint_labels
from taming.data.picture import save_png
from taming.data.scenes import LABEL_NAMES
from taming.metrics.seams import SeamFigure, periodicity, seam_figure

Size = tuple[int, int]
TRAINED, SIZES = 64, ((64, 256), (256, 256))
MODELS: dict[str, tuple[str, tuple[int, int] | None]] = {
    "full attention": ("full_attention", None),
    "window 8,7": ("window_8_7", (8, 7)),
}
"""Name -> folder of its run under --out, and its attention window."""


class EncodedScenes(PictureDataset):
    """Codes and label maps of several sets of scenes, encoded once."""

    def __init__(self, tokenizer: VQModel, parts: Sequence[tuple[ScenesDataset, int]]) -> None:
        """`parts` are data sets and how many views of each scene are taken; view 0 of one is centred."""
        codes, maps = [], []
        for data, views in parts:
            for view in range(views):
                for first in range(0, len(data), 64):
                    index = range(first, min(first + 64, len(data)))
                    batch = data.batch(index, [view - (views == 1)] * len(index))
                    with torch.no_grad():
                        codes.append(tokenizer.encode(batch["image"].float() / 127.5 - 1))
                    maps.append(batch["segmentation"].to(torch.uint8))
        self.codes, self.maps = torch.cat(codes), torch.cat(maps)
        self.size = parts[0][0].size
        self.provides = frozenset({"codes", "segmentation", "key"})
        self.class_names, self.num_labels = [], len(LABEL_NAMES)

    def __len__(self) -> int:
        return len(self.codes)

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        return {"codes": self.codes[index], "segmentation": self.maps[index].long(), "key": str(index)}

    def fingerprint(self) -> str:
        return hashlib.sha256(self.codes.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Trained:
    pipe: ARPipeline
    steps: int
    minutes: float
    bits: float


def encoded(tokenizer: VQModel) -> tuple[EncodedScenes, EncodedScenes]:
    """Whole scenes, and crops of such as are to be sampled: half and half; and held-out whole ones."""
    whole = ScenesDataset(ScenesDataConfig(size=TRAINED, num_train=3072), "train")
    crops = [
        ScenesDataset(ScenesDataConfig(size=TRAINED, crop_from=list(size), num_train=512), "train")
        for size in SIZES
    ]
    held_out = ScenesDataset(ScenesDataConfig(size=TRAINED, num_validation=256), "validation")
    return EncodedScenes(tokenizer, [(whole, 1), *((part, 3) for part in crops)]), EncodedScenes(
        tokenizer, [(held_out, 1)]
    )


def train_one(
    source: str, window: tuple[int, int] | None, splits: tuple[EncodedScenes, EncodedScenes], minutes: float,
    run: Path, start: str | None,
) -> Trained:  # fmt: skip
    """The demo's transformer on these codes, with an attention window or without."""
    config = load_config(ARTrainConfig, "stage2", [f"training.minutes={minutes}"], group="demo")
    config = config.model_copy(
        update={
            "data": ScenesDataConfig(size=TRAINED),
            "tokenizer": source,
            "init_from": start,
            "transformer": config.transformer.model_copy(update={"attention_window": window}),
            "training": config.training.model_copy(update={"steps": 6000}),
        }
    )
    begin = time.perf_counter()
    result = train(config, run, splits=splits, resume="never")
    spent = (time.perf_counter() - begin) / 60
    pipe = ARPipeline.from_pretrained(result.model)
    return Trained(pipe, result.steps, spent, bits_per_code(pipe, splits[1]))


@torch.no_grad()
def bits_per_code(pipe: ARPipeline, data: EncodedScenes) -> float:
    """Of all held-out scenes, given their maps."""
    nats = 0.0
    for first in range(0, len(data), 32):
        rows = slice(first, first + 32)
        logits = pipe.model(data.codes[rows], {"segmentation": data.maps[rows].long()})
        nats -= float(code_log_likelihood(logits, data.codes[rows].flatten(1)).sum())
    return nats / data.codes.numel() / math.log(2)


def moves(size: Size, factor: int, stride: int) -> list[int]:
    """The columns, in pixels, at which a window of this stride moves on; none where it always does."""
    window = TRAINED // factor
    places = place_windows((1, size[1] // factor), (1, window), stride)
    found = [place.column * factor for before, place in pairwise(places) if place.left != before.left]
    return [] if stride == 1 else found


def figures(
    images: Tensor, real: Tensor, size: Size, factor: int, stride: int
) -> tuple[SeamFigure, SeamFigure, SeamFigure | None, list[float]]:
    """At multiples of the trained window, alone and beside real pictures; at moves, beside them; periodicity
    of columns, and of rows of squares."""
    columns = list(range(TRAINED, size[1], TRAINED))
    rows = list(range(TRAINED, size[0], TRAINED))
    alone = seam_figure(images, columns=columns, rows=rows, step=factor)
    at_window = seam_figure(images, columns=columns, rows=rows, step=factor, reference=real)
    moved = moves(size, factor, stride)
    at_moves = seam_figure(images, columns=moved, step=factor, reference=real) if moved else None
    period = [periodicity(images, TRAINED, "columns", step=factor)]
    if rows:
        period.append(periodicity(images, TRAINED, "rows", step=factor))
    return alone, at_window, at_moves, period


def written(figure: SeamFigure | None) -> str:
    return "" if figure is None else f"{figure.ratio:.2f} +- {figure.error:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("--start", help="a pipeline whose weights both begin with")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/seams"))
    parser.add_argument("--stride", type=int, nargs="*", default=[1, 8], help="of the sliding window")
    parser.add_argument("--windows", nargs="*", default=[], help="further windows R,C: bits per code only")
    parser.add_argument("--window-minutes", type=float, default=1)
    parser.add_argument("--pictures", type=int, nargs=2, default=[24, 8], help="wide ones, and squares")
    parser.add_argument("--reuse", action="store_true", help="train nothing: sample the models in --out")
    arguments = parser.parse_args()
    tokenizer = VQModel.from_pretrained(arguments.tokenizer)
    counts = dict(zip(SIZES, arguments.pictures, strict=True))
    if arguments.reuse:
        models = {name: ARPipeline.from_pretrained(arguments.out / run) for name, (run, _) in MODELS.items()}
        sample_all(models, tokenizer, arguments.stride, arguments.out, counts)
        return
    splits = encoded(tokenizer)
    table = {
        name: train_one(
            arguments.tokenizer, window, splits, arguments.minutes, arguments.out / run, arguments.start
        )
        for name, (run, window) in MODELS.items()
    }
    models = {name: trained.pipe for name, trained in table.items()}
    for text in arguments.windows:
        rows, columns = (int(part) for part in text.split(","))
        run = arguments.out / f"short_{rows}_{columns}"
        table[f"window {text}, short"] = train_one(
            arguments.tokenizer, (rows, columns), splits, arguments.window_minutes, run, arguments.start
        )
    print_table(
        "Held-out 64 px scenes, given their label maps",
        ["", "bits a code", "steps", "minutes"],
        [[name, f"{m.bits:.3f}", str(m.steps), f"{m.minutes:.1f}"] for name, m in table.items()],
    )
    sample_all(models, tokenizer, arguments.stride, arguments.out, counts)


def sample_all(
    models: dict[str, ARPipeline],
    tokenizer: VQModel,
    strides: Sequence[int],
    out: Path,
    counts: dict[Size, int],
) -> None:
    factor, lines, sections = tokenizer.spec.downsample_factor, [], []
    full, windowed = models.values()
    for size, count in counts.items():
        if not count:
            continue
        scenes = ScenesDataset(ScenesDataConfig(size=list(size), num_validation=count), "validation")
        batch = scenes.batch(range(count), [-1] * count)
        real, maps = batch["image"].float() / 127.5 - 1, batch["segmentation"]
        with torch.no_grad():
            painted = torch.cat([tokenizer.decode(tokenizer.encode(part)) for part in real.split(4)])
        made: dict[str, tuple[Tensor, int, float]] = {
            "real": (real, 1, 0),
            "reconstructed": (painted.clamp(-1, 1), 1, 0),
        }
        for stride in strides if size[0] == TRAINED else strides[-1:]:
            made[f"sliding, stride {stride}"] = sampled(full, maps, size, stride)
        made["windowed attention"] = sampled(windowed, maps, size, 1)
        shown = [paint_labels(maps)]
        for name, (images, stride, seconds) in made.items():
            alone, at_window, at_moves, period = figures(images, real, size, factor, stride)
            lines.append(
                [f"{size[0]}x{size[1]} {name}", written(alone), written(at_window), written(at_moves),
                 " ".join(f"{value:.1f}" for value in period), f"{seconds:.0f}"]
            )  # fmt: skip
            shown.append(images)
        sections.append(shown)
    columns = ["", "window", "window, beside real", "moves, beside real", "F of columns, rows", "s"]
    print_table("Seams of large scenes", columns, lines)
    save_png(sheet(sections), out / "sheet.png")


def sampled(pipe: ARPipeline, maps: Tensor, size: Size, stride: int) -> tuple[Tensor, int, float]:
    """Pictures, the window's stride, and the seconds it took."""
    begin = time.perf_counter()
    out = pipe({"segmentation": maps}, height=size[0], width=size[1], seed=1, window_stride=stride)
    return out.images, stride, time.perf_counter() - begin


def sheet(sections: Sequence[Sequence[Tensor]], shown: int = 3, gap: int = 6) -> Tensor:
    """One row a contender (label maps, real, reconstructed, sliding ..., windowed): (3, H, W) in [-1, 1]."""
    blocks = []
    for section in sections:
        rows = [
            torch.cat([torch.nn.functional.pad(p, (0, gap, 0, gap), value=1) for p in images[:shown]], dim=-1)
            for images in section
        ]
        blocks.append(torch.cat(rows, dim=-2))
    width = max(block.shape[-1] for block in blocks)
    return torch.cat(
        [torch.nn.functional.pad(block, (0, width - block.shape[-1]), value=1) for block in blocks], dim=-2
    )


if __name__ == "__main__":
    main()
