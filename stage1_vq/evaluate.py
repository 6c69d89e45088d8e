"""How well a tokenizer keeps pictures: figures over a data set."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.figures import Distance, ReconstructionFigures
from stage1_vq.inputs import model_input, restored
from stage1_vq.model import VQModel
from stage1_vq.tiling import decode, encode
from taming.data.batch import to_device
from taming.data.config import DataConfig, ScenesDataConfig
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.errors import UserError
from taming.metrics.frechet import FeatureMoments, frechet_distance
from taming.metrics.inception import EXTRACTOR, FEATURES, InceptionFeatures
from taming.metrics.lpips import PerceptualDistance


@dataclass(frozen=True)
class Evaluation:
    """Figures of a whole data set, and of each picture."""

    figures: dict[str, float]
    """Those of stage1_vq.figures; code_usage in [0, 1], perplexity in [1, K]; the number of pictures."""
    keys: list[str] = field(default_factory=list)
    """The pictures, in the order of the data set."""
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Figure -> its value for each picture."""


@torch.no_grad()
def evaluate_tokenizer(
    model: VQModel,
    dataset: PictureDataset,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    lpips: PerceptualDistance | None = None,
    inception: InceptionFeatures | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Reconstruct every picture of `dataset`, centre-cropped, and compare.

    With `lpips` the figures have lpips, with `inception` reconstruction_fid: both for pictures of 1 or 3
    channels only. Raises UserError.
    """
    if not len(dataset):
        raise UserError("there are no pictures to evaluate on; choose another --split or more data")
    check_perceptual(model, lpips=lpips is not None, fid=inception is not None)
    model = model.to(device).eval()
    distances: dict[str, Distance] = {}
    if lpips is not None:
        distances["lpips"] = partial(_each, lpips.to(device))
    figures = ReconstructionFigures(model.config, model.spec.codebook_size, device, distances)
    real, painted = FeatureMoments(FEATURES), FeatureMoments(FEATURES)
    keys: list[str] = []
    rows: dict[str, list[float]] = {}
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        inputs = model_input(to_device(batch, device), model.config)
        codes, output = reconstruct(model, inputs)
        for name, values in figures.add(inputs, output, codes).items():
            rows.setdefault(name, []).extend(values.tolist())
        if inception is not None:
            inception.to(device)
            real.add(inception(inputs))
            painted.add(inception(output))
        keys += batch["key"]
        if progress is not None:
            progress(len(keys), len(dataset))
    means = figures.means()
    if inception is not None:
        means["reconstruction_fid"] = frechet_distance(real, painted)
    return Evaluation({**means, "pictures": len(keys)}, keys, rows)


def protocol(data: DataConfig, model: VQModelConfig, split: str, *, lpips: bool, fid: bool) -> dict[str, Any]:
    """How pictures were measured: figures that differ in any of these cannot be compared."""
    filter_name = {"segmentation": "nearest", "depth": "bilinear, antialiased"}.get(
        model.input, "bicubic, antialiased"
    )
    if isinstance(data, ScenesDataConfig):
        resize = "none: drawn at this size"
    else:
        shorter = "as small as covers the crop" if data.resize is None else f"{data.resize} pixels"
        resize = f"shorter side to {shorter}, {filter_name}"
    facts: dict[str, Any] = {
        "input": model.input,
        "split": split,
        "size": list(data.height_width),
        "resize": resize,
        "crop": "centre",
        "range": "reconstructions clamped; psnr and ssim of [0, 1], l1 of [-1, 1]",
    }
    if model.input == "segmentation":
        facts["range"] = "the most probable label of each pixel"
    if lpips:
        facts["lpips_network"] = "VGG16 (lpips 0.1)"
    if fid:
        facts["fid_extractor"] = EXTRACTOR
    return facts


def write_rows(evaluation: Evaluation, path: Path) -> None:
    """Each picture's figures as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("key", *evaluation.rows))
        writer.writerows(zip(evaluation.keys, *evaluation.rows.values(), strict=True))


def check_perceptual(model: VQModel, *, lpips: bool, fid: bool) -> None:
    """Raises UserError where networks that were trained on pictures would be asked about something else."""
    for name, wanted in (("lpips", lpips), ("fid", fid)):
        if wanted and (model.config.input == "segmentation" or model.config.in_channels not in (1, 3)):
            raise UserError(
                f"--{name} looks at pictures of 1 or 3 channels; this tokenizer is of {model.config.input} "
                f"with {model.config.in_channels} channels: leave it out"
            )


def _each(distance: PerceptualDistance, found: Tensor, wanted: Tensor) -> Tensor:
    """(B,): the distance is a mean over its batch."""
    return torch.stack([distance(a[None], b[None]) for a, b in zip(found, wanted, strict=True)])


def reconstruct(model: VQModel, inputs: Tensor, *, tile: int | None = None) -> tuple[Tensor, Tensor]:
    """Inputs (B, C, H, W) -> (codes (B, h, w), what they decode to, clamped to [-1, 1] or logits).

    In tiles where pictures are large; `tile` as in stage1_vq.tiling.decode.
    """
    codes = encode(model, inputs, tile=tile)
    return codes, restored(decode(model, codes, tile=tile), model.config)
