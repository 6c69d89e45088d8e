"""A folder with everything that belongs to pictures, and its pack, for the tests of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from taming.data.config import FolderDataConfig, ShardsDataConfig
from taming.data.dataset import PictureDataset

LAYOUT: dict[str, Any] = {
    "segmentation": "labels",
    "num_labels": 5,
    "depth": "depth",
    "condition_image": "edges",
    "objects": "boxes.json",
    "text": "captions",
    "class_labels": True,
}


def write_everything(root: Path, count: int = 8) -> FolderDataConfig:
    """`count` pictures of two classes with all that can belong to them; keys with dots, % and spaces."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for n in range(count):
        name = f"{'ab'[n % 2]}/picture {n}" + ("" if n % 3 else ".v1%2E")
        size = (20 + n, 24)
        pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        _save(pixels, root / "images" / f"{name}.{('png', 'jpg', 'JPG')[n % 3]}")
        _save(random.integers(0, 5, size, dtype=np.uint8), root / "labels" / f"{name}.png")
        _save(random.integers(0, 65536, size, dtype=np.uint16), root / "depth" / f"{name}.png")
        _save(255 - pixels, root / "edges" / f"{name}.webp")
        caption = root / "captions" / f"{name}.txt"
        caption.parent.mkdir(parents=True, exist_ok=True)
        caption.write_text(f"number {n}\n\n  once more {n}, café \n", encoding="utf-8")
        images.append({"id": n, "file_name": f"{name}.png", "height": size[0], "width": size[1]})
        box = {"image_id": n, "category_id": n % 2, "bbox": [2.5, 3, 17.1, 12 + n / 3]}
        annotations += [box] if n else []
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(document))
    return FolderDataConfig(
        root=root, size=16, resize=18, random_scale=(1.0, 1.2), validation_fraction=0.3, **LAYOUT
    )


def of_shards(
    config: FolderDataConfig | ShardsDataConfig, root: Path | str, **changes: Any
) -> ShardsDataConfig:
    """The same data from a pack of it, as a user would switch: kind and root alone change."""
    return ShardsDataConfig(**{**config.model_dump(), "kind": "shards", "root": root, **changes})


def assert_equal_samples(first: PictureDataset, second: PictureDataset) -> None:
    """The same samples under the same numbers, centred and augmented."""
    assert len(first) == len(second) > 0
    assert first.provides == second.provides
    assert list(first.class_names) == list(second.class_names)
    assert list(first.object_names) == list(second.object_names)
    assert first.num_labels == second.num_labels
    for index in range(len(first)):
        for epoch in (-1, 2):
            one, other = first.sample(index, epoch, seed=5), second.sample(index, epoch, seed=5)
            assert list(one) == list(other)
            for name, value in one.items():
                same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else None
                assert same if same is not None else value == other[name], (index, epoch, name)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
