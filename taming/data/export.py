"""The built-in scenes as files, in the layout that FolderDataConfig reads."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from taming.data.scenes import CLASS_NAMES, LABEL_NAMES, Scene, render_scene
from taming.errors import DataError

_OURS = re.compile(r"scene_\d{6}\.(png|txt)")


def write_scenes(
    folder: Path, num: int, *, size: tuple[int, int] = (64, 64), seed: int = 0, overwrite: bool = False
) -> Iterator[int]:
    """Write scenes 0 to num - 1 of `seed`; yields the number of each when it is written.

    images/NAME.png, segmentation/NAME.png (8-bit labels), depth/NAME.png (16-bit inverse depth),
    captions/NAME.txt, labels.csv (name, class, text), label_names.txt (a line a segmentation label),
    objects.json (boxes as in COCO, in pixels). Raises DataError for a folder that is not empty, unless
    `overwrite`: then scenes of an earlier run are replaced and other files are left alone.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, not a folder; give another --out")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise DataError(f"{folder} is not empty; give another --out, or --overwrite to replace its scenes")
    for name in ("images", "segmentation", "depth", "captions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        # A longer earlier run would leave maps or pictures that have no partner.
        for path in (folder / name).iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
    rows: list[tuple[str, str, str]] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num):
        scene, name = render_scene(seed, index, size), f"scene_{index:06d}"
        _write_pictures(folder, name, scene)
        (folder / "captions" / f"{name}.txt").write_text(scene.text + "\n", encoding="utf-8")
        rows.append((name, CLASS_NAMES[scene.label], scene.text))
        images.append({"id": index, "file_name": f"{name}.png", "height": size[0], "width": size[1]})
        for item in scene.objects:
            x0, y0, x1, y1 = item["box"]
            width, height = (x1 - x0) * size[1], (y1 - y0) * size[0]
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": index,
                    "category_id": item["label"],
                    "bbox": [x0 * size[1], y0 * size[0], width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        yield index
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("name", "class", "text"), *rows])
    (folder / "label_names.txt").write_text("\n".join(LABEL_NAMES) + "\n", encoding="utf-8")
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASS_NAMES)]
    objects = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "objects.json").write_text(json.dumps(objects), encoding="utf-8")


def _write_pictures(folder: Path, name: str, scene: Scene) -> None:
    Image.fromarray(scene.image).save(folder / "images" / f"{name}.png")
    Image.fromarray(scene.segmentation).save(folder / "segmentation" / f"{name}.png")
    depth = np.round(scene.depth * 65535).astype(np.uint16)
    Image.fromarray(depth).save(folder / "depth" / f"{name}.png")
