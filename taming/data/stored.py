"""Samples of pictures that lie in files of any size: what folders and shards share.

Axes: C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from taming.data.boxes import crop_objects, mirror_objects
from taming.data.channels import read_pixels
from taming.data.config import PicturesConfig
from taming.data.dataset import PictureDataset
from taming.data.picture import Source, read_depth, read_labels
from taming.data.scenes import SceneObject
from taming.data.transforms import Crop, choose_crop, crop_depth, crop_labels, uniforms
from taming.errors import BadSample

MapKind = Literal["segmentation", "depth", "condition_image"]
MAP_KINDS: tuple[MapKind, ...] = ("segmentation", "depth", "condition_image")


@dataclass(frozen=True)
class Stored:
    """One picture as it lies in its file, and what belongs to it."""

    key: str
    size: tuple[int, int]
    """(H, W), upright."""
    image: Source
    maps: Mapping[MapKind, Source] = field(default_factory=dict)
    label: int | None = None
    objects: Sequence[SceneObject] | None = None
    captions: Sequence[str] | None = None


class StoredDataset(PictureDataset):
    """Crops of stored pictures, the same wherever they are stored."""

    config: PicturesConfig

    @abstractmethod
    def stored(self, index: int) -> Stored:
        """What sample `index` is made of. Raises BadSample."""

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        stored = self.stored(index)
        key, crop = stored.key, self._crop(stored, epoch, seed)
        channels = self.config.channels
        sample: dict[str, Any] = {"image": self._read(stored.image, channels, crop), "key": key}
        sample["crop"] = torch.tensor(crop.frame, dtype=torch.float32)
        limit = self.config.max_pixels
        for kind, source in stored.maps.items():
            if kind == "segmentation":
                labels = crop_labels(read_labels(source, max_pixels=limit), crop, self.size)
                if labels.min() < 0 or labels.max() >= self.num_labels:
                    raise BadSample(
                        f"map {source} holds labels from {labels.min()} to {labels.max()}; they lie in"
                        f" [0, {self.num_labels})",
                        "mismatched",
                    )
                sample[kind] = torch.from_numpy(labels)
            elif kind == "depth":
                depth = crop_depth(read_depth(source, max_pixels=limit), crop, self.size)
                sample[kind] = torch.from_numpy(depth)[None]
            else:
                sample[kind] = self._read(source, self.config.condition_channels, crop)
        if stored.label is not None:
            sample["label"] = stored.label
        if stored.objects is not None:
            frame = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
            objects = crop_objects(stored.objects, frame, visible=self.config.least_visible)
            sample["objects"] = mirror_objects(objects) if crop.flip else objects
        if stored.captions is not None:
            chance = 0.0 if epoch < 0 else uniforms(seed, epoch, f"{key}/caption", 1)[0]
            sample["text"] = stored.captions[int(chance * len(stored.captions))]
        return sample

    def _crop(self, stored: Stored, epoch: int, seed: int) -> Crop:
        config = self.config
        if epoch < 0:
            return choose_crop(stored.size, self.size, resize=config.resize, upscale=config.upscale)
        scale, top, left, flip = uniforms(seed, epoch, stored.key, 4)
        lowest, highest = config.random_scale
        return choose_crop(
            stored.size,
            self.size,
            resize=config.resize,
            upscale=config.upscale,
            position=(top, left) if config.crop == "random" else (0.5, 0.5),
            scale=lowest + scale * (highest - lowest),
            flip=config.flip and flip < 0.5,
        )

    def _read(self, source: Source, channels: int, crop: Crop) -> torch.Tensor:
        limit = self.config.max_pixels
        return torch.from_numpy(read_pixels(source, channels, crop=crop, size=self.size, max_pixels=limit))


def held_out(keys: Sequence[str], fraction: float) -> set[str]:
    """Keys of the validation split: those whose hash lies below the fraction.

    A picture stays where it is when others come or go. Where there is a choice, each split has one.
    """
    if fraction == 0 or len(keys) < 2:
        return set()
    places = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in keys]
    below = {key for key, place in zip(keys, places, strict=True) if place < fraction}
    if 0 < len(below) < len(keys):
        return below
    order = sorted(zip(places, keys, strict=True))
    return {key for _, key in (order[:-1] if below else order[:1])}
