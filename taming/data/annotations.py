"""Objects of pictures: boxes with classes, read from COCO annotations."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from taming.data.boxes import Box, crop_box
from taming.data.scenes import SceneObject
from taming.errors import DataError

_LARGEST = 1e9  # pixels


@dataclass(frozen=True)
class Annotations:
    """What a file of annotations says about the pictures at hand."""

    names: list[str]
    """Names of the classes: label n is the category with the n-th smallest id."""
    objects: dict[str, list[SceneObject]]
    """Key of a picture -> its objects, in the order of the file."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What was left out and how often: pictures not at hand, crowds, boxes without area."""


def read_annotations(path: Path, keys: Collection[str], *, crowds: bool = False) -> Annotations:
    """Boxes from a JSON in the layout of COCO's instances (Lin et al. 2014, and its documentation).

    `keys` name the pictures at hand (paths without suffix); a `file_name` belongs to the picture of that
    path, or else to the only one of that name in any folder. Boxes are read in pixels of the width and
    height that the file gives, whatever the size of the picture on disk, and clipped to it. Regions
    marked `iscrowd` are left out unless `crowds`. Raises DataError for a file that is missing or malformed,
    and for a picture that it does not list.
    """
    document = read_json(path)
    categories = entries_of(document, "categories", path, {"id": int, "name": str})
    ids = sorted(category["id"] for category in categories)
    if not ids or len(set(ids)) < len(ids):
        raise DataError(f"{path} has {'no categories' if not ids else 'two categories of one id'}; mend it")
    labels = {number: label for label, number in enumerate(ids)}
    names = [name for _, name in sorted((category["id"], category["name"]) for category in categories)]
    found, absent = match_pictures(document, path, keys)
    skipped = {"pictures not at hand": absent, "crowds": 0, "boxes without area": 0}
    objects: dict[str, list[SceneObject]] = {key: [] for key, _ in found.values()}
    kinds = {"image_id": int, "category_id": int, "bbox": list}
    for number, entry in enumerate(entries_of(document, "annotations", path, kinds)):
        if entry["image_id"] not in found:
            continue
        key, image = found[entry["image_id"]]
        if entry["category_id"] not in labels:
            raise DataError(
                f"{path}: annotation {number} has the category {entry['category_id']}, which `categories` "
                "does not list; add it there or remove the annotation"
            )
        if entry.get("iscrowd") and not crowds:
            skipped["crowds"] += 1
            continue
        box = _box_of(entry["bbox"], image, path, number)
        if box is None:
            skipped["boxes without area"] += 1
            continue
        objects[key].append({"label": labels[entry["category_id"]], "box": box})
    return Annotations(names, objects, skipped)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises DataError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}; check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; write it again") from None
    if not isinstance(document, dict):
        raise DataError(f"{path} holds {_json_type(document)} at its top; it must be an object {{...}}")
    return document


def match_pictures(
    document: Mapping[str, Any], path: Path, keys: Collection[str]
) -> tuple[dict[int, tuple[str, dict[str, Any]]], int]:
    """COCO's image id -> (key of the picture at hand, its entry), and how many entries are not at hand.

    Raises DataError where pictures at hand are not listed, or listed twice.
    """
    by_name: dict[str, list[str]] = {}
    for key in keys:
        by_name.setdefault(PurePosixPath(key).name, []).append(key)
    at_hand = set(keys)
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    taken: set[str] = set()
    absent = 0
    for image in entries_of(document, "images", path, {"id": int, "file_name": str}):
        path_given = PurePosixPath(image["file_name"].replace("\\", "/"))
        stem = path_given.with_name(path_given.stem) if path_given.name else path_given
        same_name = by_name.get(stem.name, [])
        if stem.as_posix() in at_hand:
            key = stem.as_posix()
        elif len(same_name) == 1:
            key = same_name[0]
        else:
            absent += 1
            continue
        if key in taken or image["id"] in found:
            raise DataError(
                f"{path} lists {image['file_name']} or its id {image['id']} twice; remove one entry"
            )
        taken.add(key)
        found[image["id"]] = (key, image)
    missing = sorted(at_hand - taken)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{path} does not list the picture {missing[0]}{more} among its images; add it there, without "
            "annotations if it has none, or remove the picture"
        )
    return found, absent


def _box_of(values: list[Any], image: Mapping[str, Any], path: Path, number: int) -> Box | None:
    """COCO's [left, top, width, height] in pixels as a box in [0, 1]; None without area."""
    if len(values) != 4 or not all(_is_number(value) for value in values):
        raise DataError(
            f"{path}: bbox {values} of annotation {number} is not [left, top, width, height]; mend it"
        )
    width, height = image.get("width", 0), image.get("height", 0)
    if not (_is_number(width) and _is_number(height) and min(width, height) > 0):
        raise DataError(
            f"{path}: image {image['file_name']} has the size {width!r}x{height!r}; give `width` and "
            "`height` in pixels, which its boxes are measured in"
        )
    left, top, across, down = values
    if across <= 0 or down <= 0:
        return None
    pixels = (left / width, top / height, (left + across) / width, (top + down) / height)
    return crop_box(pixels, (0.0, 0.0, 1.0, 1.0))


def entries_of(
    document: Mapping[str, Any], name: str, path: Path, kinds: Mapping[str, type]
) -> list[dict[str, Any]]:
    """The list `name` of a document, each entry an object with these keys. Raises DataError."""
    entries = document.get(name)
    if not isinstance(entries, list):
        raise DataError(f"{path} has no list {name!r}: it is no file of COCO annotations; check the path")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {number} of {name} is {_json_type(entry)}, not an object {{...}}")
        for key, kind in kinds.items():
            value = entry.get(key)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DataError(
                    f"{path}: entry {number} of {name} has {key} = {value!r}; it must be a {kind.__name__}"
                )
    return entries


def _is_number(value: Any) -> bool:
    # By its size, since a whole number from JSON may be too large to be asked whether it is finite.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a text", dict: "an object", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
