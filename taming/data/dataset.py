"""Datasets: what every source of pictures gives, and the built-in scenes as one.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from taming.data.batch import collate
from taming.data.boxes import crop_objects, mirror_box, mirror_objects
from taming.data.config import DataConfig, FolderDataConfig, ScenesDataConfig, ShardsDataConfig
from taming.data.order import epoch_order
from taming.data.scenes import (
    CLASS_NAMES,
    LABEL_NAMES,
    PROTOTYPES,
    SMALLEST_SHARE,
    Scene,
    SceneObject,
    every_phrase,
    render_scene,
)
from taming.data.transforms import uniforms
from taming.types import Batch

Split = Literal["train", "validation"]


class PictureDataset(ABC):
    """A fixed, numbered collection of pictures of one size, with what belongs to each."""

    size: tuple[int, int]
    """(H, W) of every picture and map."""
    provides: frozenset[str]
    """The keys of a batch (see taming.types.Batch)."""
    class_names: list[str]
    """Names of the picture's classes; empty without class labels."""
    num_labels: int
    """Labels of the segmentation maps; 0 without maps."""
    object_names: Sequence[str] = ()
    """Names of the objects' classes; empty without objects."""
    notes: Sequence[str] = ()
    """What a user should know of the data before training: what was left out of it, say."""
    skip_budget: float = 0.0
    """Share of the samples that may turn out to be bad in training: they are replaced by others."""
    patience_seconds: float = 300.0
    """A batch that takes a data worker longer than this will not come."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_object_classes(self) -> int:
        return len(self.object_names)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        """One sample: image uint8 (C, H, W), segmentation int64 (H, W), depth float32 (1, H, W), ...

        What is random about it is a pure function of (seed, epoch, the sample's key). Epoch -1 means
        without augmentation: centre crop, no mirror image. Raises BadSample for a file that went bad.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 in hex over the samples' names and sizes: changes whenever the data does."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """(len,): the samples of an epoch in the order in which training takes them, each exactly once.

        A pure function of its arguments. Sources that read faster in some orders give one of those.
        """
        return epoch_order(seed, epoch, len(self))

    def texts(self) -> Iterator[str]:
        """Every caption that samples may show, or others of the same words; nothing without captions."""
        if "text" in self.provides:
            for index in range(len(self)):
                yield self.sample(index, -1)["text"]

    def batch(self, indices: Sequence[int], epochs: Sequence[int], *, seed: int = 0) -> Batch:
        """Several samples, collated."""
        return collate(
            [self.sample(index, epoch, seed=seed) for index, epoch in zip(indices, epochs, strict=True)]
        )


def open_dataset(config: DataConfig, split: Split) -> PictureDataset:
    """Open one split. All that can be found wrong before training is: raises DataError."""
    match config:
        case ScenesDataConfig():
            return ScenesDataset(config, split)
        case FolderDataConfig():
            from taming.data.folder import FolderDataset

            return FolderDataset(config, split)
        case ShardsDataConfig():
            from taming.data.shards.dataset import ShardDataset

            return ShardDataset(config, split)


class ScenesDataset(PictureDataset):
    """The built-in scenes. The validation split is another endless set, so that no scene is in both."""

    def __init__(self, config: ScenesDataConfig, split: Split) -> None:
        self.config = config
        self.split = split
        self.size, self._drawn = config.height_width, config.drawn_height_width
        names = {"image", "label", "segmentation", "depth", "objects", "text", "key"}
        self.provides = frozenset(names if config.crop_from is None else names | {"crop"})
        self.class_names = list(CLASS_NAMES)
        self.object_names = CLASS_NAMES
        self.num_labels = len(LABEL_NAMES)
        self.prototypes = PROTOTYPES
        self._length = config.num_train if split == "train" else config.num_validation
        self._seed = 2 * config.seed + (split == "validation")
        # Filled scene by scene on first use; memory that is never written to is never taken.
        kept, (height, width) = (self._length if config.cache else 0), self._drawn
        self._filled = np.zeros(kept, dtype=bool)
        self._images = np.empty((kept, 3, height, width), dtype=np.uint8)
        self._segmentations = np.empty((kept, height, width), dtype=np.uint8)
        self._depths = np.empty((kept, height, width), dtype=np.float16)
        self._labels = np.empty(kept, dtype=np.int64)
        self._objects: list[list[SceneObject]] = [[] for _ in range(kept)]
        self._texts = [""] * kept

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        batch = self.batch([index], [epoch], seed=seed)
        return {name: value[0] if name != "label" else int(value[0]) for name, value in batch.items()}

    def batch(self, indices: Sequence[int], epochs: Sequence[int], *, seed: int = 0) -> Batch:
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._length):
            raise IndexError(f"scenes are numbered 0 to {self._length - 1}, not {rows.min()} to {rows.max()}")
        keys = [self.key(index) for index in indices]
        if self.config.cache:
            for index in rows[~self._filled[rows]].tolist():
                self._keep(index)
            arrays: dict[str, np.ndarray] = {
                "image": self._images[rows],
                "label": self._labels[rows],
                "segmentation": self._segmentations[rows].astype(np.int64),
                "depth": self._depths[rows].astype(np.float32)[:, None],
            }
            objects, texts = [self._objects[i] for i in indices], [self._texts[i] for i in indices]
        else:
            scenes = [self._render(index) for index in indices]
            arrays = {
                "image": np.stack([scene.image.transpose(2, 0, 1) for scene in scenes]),
                "label": np.array([scene.label for scene in scenes], dtype=np.int64),
                "segmentation": np.stack([scene.segmentation for scene in scenes]).astype(np.int64),
                "depth": np.stack([_half(scene.depth) for scene in scenes]).astype(np.float32)[:, None],
            }
            objects, texts = [scene.objects for scene in scenes], [scene.text for scene in scenes]
        if self.config.crop_from is not None:
            arrays, objects = self._cropped(arrays, objects, epochs, keys, seed)
        if self.config.flip:
            for n, (epoch, key) in enumerate(zip(epochs, keys, strict=True)):
                if epoch >= 0 and uniforms(seed, epoch, key, 1)[0] < 0.5:
                    for name in ("image", "segmentation", "depth"):
                        arrays[name][n] = arrays[name][n, ..., ::-1].copy()
                    objects[n] = mirror_objects(objects[n])
                    if "crop" in arrays:
                        arrays["crop"][n] = mirror_box(arrays["crop"][n].tolist())
        tensors: Batch = {
            name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()
        }
        return {**tensors, "objects": objects, "text": texts, "key": keys}

    def texts(self) -> Iterator[str]:
        # Drawing all scenes for the sake of their few words would take longer than a short training.
        yield from every_phrase()

    def key(self, index: int) -> str:
        return f"scene-{self._seed}-{index:06d}"

    def fingerprint(self) -> str:
        facts = ["scenes", self._seed, self._length, *self.size]
        if self.config.crop_from is not None:
            facts += ["of", *self._drawn]
        return hashlib.sha256("/".join(map(str, facts)).encode()).hexdigest()

    def _render(self, index: int) -> Scene:
        return render_scene(self._seed, int(index), self._drawn)

    def _cropped(
        self,
        arrays: dict[str, np.ndarray],
        objects: list[list[SceneObject]],
        epochs: Sequence[int],
        keys: Sequence[str],
        seed: int,
    ) -> tuple[dict[str, np.ndarray], list[list[SceneObject]]]:
        """Crops of whole scenes: everything cut alike, and "crop" (B, 4)."""
        (height, width), (whole_height, whole_width) = self.size, self._drawn
        cut: dict[str, list[np.ndarray]] = {name: [] for name in ("image", "segmentation", "depth", "crop")}
        kept = []
        for n, (epoch, key) in enumerate(zip(epochs, keys, strict=True)):
            down, right = (0.5, 0.5) if epoch < 0 else uniforms(seed, epoch, f"{key}/crop", 2)
            top, left = int(down * (whole_height - height + 1)), int(right * (whole_width - width + 1))
            for name in ("image", "segmentation", "depth"):
                cut[name].append(arrays[name][n, ..., top : top + height, left : left + width])
            box = (
                left / whole_width,
                top / whole_height,
                (left + width) / whole_width,
                (top + height) / whole_height,
            )
            cut["crop"].append(np.array(box, dtype=np.float32))
            kept.append(crop_objects(objects[n], box, least=SMALLEST_SHARE * min(self.size) / max(self.size)))
        return {**arrays, **{name: np.stack(values) for name, values in cut.items()}}, kept

    def _keep(self, index: int) -> None:
        if self._filled[index]:
            return  # twice in one batch
        scene = self._render(index)
        self._images[index] = scene.image.transpose(2, 0, 1)
        self._segmentations[index] = scene.segmentation
        self._depths[index] = _half(scene.depth)
        self._labels[index] = scene.label
        self._objects[index], self._texts[index] = scene.objects, scene.text
        self._filled[index] = True


def _half(depth: np.ndarray) -> np.ndarray:
    # Half precision keeps 11 bits of depth at half the memory; uncached scenes are rounded alike.
    return depth.astype(np.float16)
