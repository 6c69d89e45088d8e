"""How close a generator's pictures are to real ones: figures over a data set.

Axes: N pictures, C channels, H W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming.data.batch import to_device
from taming.data.config import DataConfig
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.data.picture import to_uint8
from taming.disk import room_for
from taming.errors import UserError
from taming.gan.model import GANModel
from taming.metrics.feature_distance import FeatureDistance, levels_of
from taming.metrics.fidelity import Pictures8Bit, fidelity, fidelity_protocol
from taming.metrics.inception import EXTRACTOR
from taming.metrics.sliced_wasserstein import PATCH, SlicedWasserstein
from taming.metrics.told_apart import PictureClassifier, told_apart

Progress = Callable[[int, int], None]
PATCHED_UP_TO = 512
"""Sides of pictures above which patches of all bands are not compared: they would not fit into memory."""


def evaluate_gan(
    model: GANModel,
    dataset: PictureDataset,
    *,
    num: int | None = None,
    seed: int = 0,
    truncation: float | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    fid: bool = False,
    inception_weights: str | Path | None = None,
    judge: PictureClassifier | None = None,
    unseen: PictureDataset | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Paint `num` pictures (None: as many as `dataset` has) and compare them with all of `dataset`.

    feature_distance, and patch_distance with patch_distance_BAND (sliced Wasserstein) up to 512 px; with
    `fid` fid, inception_score and kid with their deviations; with a `judge`, whose `unseen` pictures are the
    real ones it is asked about, the class accuracies of taming.metrics.told_apart. Where the data has the
    model's classes, picture i is of the class of real picture i, else they are spread evenly.
    Raises UserError.
    """
    real = len(dataset)
    if not real:
        raise UserError("there are no pictures to compare with; choose another --split or more data")
    check_pictures(model, dataset)
    num = real if num is None else num
    if min(num, real) < 2:
        raise UserError(f"{min(num, real)} picture is no set to compare; use two or more of either kind")
    classes = _classes(model, dataset, num)
    distance = FeatureDistance(dataset.size, model.config.channels, device=device)
    small = min(dataset.size) >= PATCH and max(dataset.size) <= PATCHED_UP_TO
    patches = SlicedWasserstein(dataset.size, model.config.channels) if small else None
    with _painted(model.to(device), num, classes, seed, truncation, batch_size, progress) as pixels:
        for part in pixels.split(batch_size):
            images = part.float() / 127.5 - 1
            distance.add_generated(images)
            if patches is not None:
                patches.add_generated(images)
        for batch in evaluation_batches(dataset, batch_size=batch_size):
            images = to_device(batch, "cpu")["image"]
            distance.add_real(images)
            if patches is not None:
                patches.add_real(images)
        figures: dict[str, float] = {"feature_distance": distance.value()}
        if patches is not None:
            bands = patches.value()
            figures["patch_distance"] = bands.pop("mean")
            figures |= {f"patch_distance_{band}": value for band, value in bands.items()}
        if judge is not None and classes is not None and unseen is not None:
            pairs = (
                (part.float() / 127.5 - 1, asked)
                for part, asked in zip(pixels.split(batch_size), classes.split(batch_size), strict=True)
            )
            figures |= told_apart(judge.to(device), labelled(unseen, batch_size), pairs).figures()
        if fid:
            figures |= fidelity(
                Pictures8Bit(lambda i: pixels[i], num),
                Pictures8Bit(lambda i: to_device(dataset.batch([i], [-1]), "cpu")["image"][0], real),
                weights=inception_weights,
                device=device,
                batch_size=batch_size,
                progress=progress,
            )
    return {**figures, "pictures": num, "real_pictures": real}


def evaluation_protocol(
    data: DataConfig, split: str, *, num: int, real: int, seed: int, truncation: float | None, fid: bool
) -> dict[str, Any]:
    """How pictures were measured: figures that differ in any of these cannot be compared."""
    facts: dict[str, Any] = {
        "split": split,
        "size": list(data.height_width),
        "seed": seed,
        "truncation": truncation,
        "feature_levels": levels_of(data.height_width),
        "range": "clamped to [-1, 1], 8 bits",
    }
    return facts | ({"fid_extractor": EXTRACTOR, **fidelity_protocol(num, real)} if fid else {})


def check_pictures(model: GANModel, dataset: PictureDataset) -> None:
    """Raises UserError where the data's pictures are of another size or kind than the model's."""
    height, width = model.config.size
    if tuple(dataset.size) != (height, width):
        raise UserError(
            f"the model paints pictures of {height}x{width}, the data's are {dataset.size[0]}x"
            f"{dataset.size[1]}: set -o size=[{height},{width}]"
        )
    channels = dataset.batch([0], [-1])["image"].shape[1]
    if channels != model.config.channels:
        raise UserError(
            f"the model paints {model.config.channels} channels, the data's pictures have {channels}: set "
            f"-o channels={model.config.channels}"
        )


def check_classes(model: GANModel, dataset: PictureDataset) -> None:
    """Raises UserError where the model's classes are not the data's: they could not be told apart."""
    names = list(model.config.class_names)
    if model.config.num_classes is None:
        raise UserError("this model was trained without classes; leave --classes out")
    if "label" not in dataset.provides:
        raise UserError("the data has no classes; set -o class_labels=true, or leave --classes out")
    if len(dataset.class_names) != model.config.num_classes or (names and names != dataset.class_names):
        there = ", ".join(dataset.class_names[:10])
        here = ", ".join(names[:10]) or f"{model.config.num_classes} without names"
        raise UserError(
            f"the data's classes ({there}) are not the model's ({here}); give the data that it was trained "
            "on, or leave --classes out"
        )


def labelled(dataset: PictureDataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pictures (B, C, H, W) in [-1, 1] and their classes (B,)."""
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        moved = to_device(batch, "cpu")
        yield moved["image"], moved["label"]


def _classes(model: GANModel, dataset: PictureDataset, num: int) -> Tensor | None:
    """(num,): of what class each generated picture shall be; None for a model without classes."""
    count = model.config.num_classes
    if count is None:
        return None
    if "label" not in dataset.provides or dataset.num_classes != count:
        return torch.arange(num) % count
    labels = torch.cat([batch["label"] for batch in evaluation_batches(dataset, batch_size=64)])
    return labels.repeat(-(-num // len(labels)))[:num]


@contextmanager
def _painted(
    model: GANModel,
    num: int,
    classes: Tensor | None,
    seed: int,
    truncation: float | None,
    batch_size: int,
    progress: Progress | None,
) -> Iterator[Tensor]:
    """(num, C, H, W) uint8 in a file that is gone afterwards: as many pictures as FID wants fill a memory."""
    shape = (num, model.config.channels, *model.config.size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.npy"
        with room_for("painted pictures", path):
            pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
            for first in range(0, num, batch_size):
                count = min(batch_size, num - first)
                asked = None if classes is None else classes[first : first + count].tolist()
                images = model.sample(
                    count, seed=seed, first=first, classes=asked, truncation=truncation, batch_size=count
                )
                if not images.isfinite().all():
                    raise UserError("the model paints NaN or infinite values: it has diverged")
                pixels[first : first + count] = to_uint8(images).numpy()
                if progress is not None:
                    progress(first + count, num)
        yield torch.from_numpy(pixels)
