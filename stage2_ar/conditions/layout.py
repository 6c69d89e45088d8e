"""Layouts of objects: what a user gives, what a batch may hold, and a window's part of it.

A layout is a list of {"label": int, "box": (x0, y0, x1, y1)} with boxes in [0, 1] of the picture. It is a
set: `arranged` puts it into an order of its own before it is embedded, so that the order in which objects
are given changes nothing.

Axes: B layouts.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stage2_ar.conditions.base import Condition, Grid, WindowPrefix
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from taming.data.boxes import Box, box_area, crop_objects
from taming.data.dataset import PictureDataset
from taming.data.scenes import SceneObject
from taming.errors import UserError
from taming.types import Batch, Prefix

Layout = list[SceneObject]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
_LARGEST = 1e9


class LayoutCondition(Condition):
    """What both encodings of layouts share: reading, checks, and windows that rebuild the layout."""

    keys: Mapping[str, str] = {"objects": "objects"}

    def __init__(self, config: ObjectsConditionConfig) -> None:
        super().__init__(config.dropout)
        self.config = config

    @abstractmethod
    def embed_layouts(self, layouts: Sequence[Layout], frames: Sequence[Box], grid: Grid) -> Prefix:
        """The prefix of layouts relative to their frames, each frame being a part of its whole picture."""

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        layouts = batch["objects"]
        frames = [WHOLE] * len(layouts)
        if "crop" in batch:
            frames = [(row[0], row[1], row[2], row[3]) for row in batch["crop"].tolist()]
        return self.embed_layouts(layouts, frames, grid)

    def windows(self, batch: Batch, grid: Grid, size: Grid) -> WindowPrefix:
        """Each window's layout: objects cut off at its edges, relative to it; those outside are left out."""
        self.check(batch, grid)
        layouts, kept = batch["objects"], dict[tuple[int, int], Prefix]()

        def at(top: int, left: int) -> Prefix:
            if (top, left) not in kept:
                kept.clear()  # the last one is what is asked for again
                frame = _frame(top, left, size, grid)
                parts = [crop_objects(_plain(layout), frame) for layout in layouts]
                kept[top, left] = self.embed_layouts(parts, [frame] * len(parts), size)
            return kept[top, left]

        return at

    def check(self, batch: Batch, grid: Grid) -> None:
        if "objects" not in batch:
            raise UserError("the objects condition needs boxes of objects; the data has none")
        for layout in batch["objects"]:
            for item in layout:
                _check_object(item, self.config.num_classes)

    def check_data(self, data: PictureDataset) -> None:
        if "objects" not in data.provides:
            raise UserError(
                "condition.kind=objects needs boxes of objects, and the data has none; set data.objects to a "
                "JSON of COCO annotations"
            )
        if data.num_object_classes > self.config.num_classes:
            raise UserError(
                f"the data has {data.num_object_classes} classes of objects, but condition.num_classes is "
                f"{self.config.num_classes}; set condition.num_classes={data.num_object_classes}"
            )
        names = list(data.object_names)
        if self.config.names and names and list(self.config.names[: len(names)]) != names:
            raise UserError(
                f"condition.names begin with {self.config.names[0]!r}, those of the data with {names[0]!r}: "
                "labels would mean other things; leave condition.names out to take the data's"
            )

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"objects": [[{"label": 0, "box": (0.25, 0.25, 0.75, 0.75)}] for _ in range(batch_size)]}

    def read_value(self, name: str, value: Any, device: torch.device | str) -> Any:
        """[{"label": number or name, "box": [x0, y0, x1, y1]}, ...], or a list of such lists."""
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not len(value):
            raise UserError(
                "condition 'objects' must be a list of objects, or a list of such lists; for a picture "
                "without objects give [[]]"
            )
        layouts = [value] if isinstance(value[0], Mapping) else value
        read: list[Layout] = []
        for layout in layouts:
            if not isinstance(layout, Sequence) or isinstance(layout, str | bytes):
                raise UserError(
                    f"condition 'objects' holds {layout!r} where a list of objects is meant; give one list a "
                    "picture"
                )
            if len(layout) > self.config.max_objects:
                raise UserError(
                    f"a layout has {len(layout)} objects, but the model takes at most "
                    f"{self.config.max_objects}; leave out the smallest"
                )
            read.append([self._read_object(item) for item in layout])
        return read

    def _read_object(self, item: Any) -> SceneObject:
        if not isinstance(item, Mapping) or set(item) != {"label", "box"}:
            raise UserError(f'{item!r} is no object; write {{"label": 0, "box": [x0, y0, x1, y1]}}')
        label = item["label"]
        if isinstance(label, str):
            label = self._label_of(label)
        found: SceneObject = {"label": label, "box": item["box"]}
        _check_object(found, self.config.num_classes)
        return _plain([found])[0]

    def _label_of(self, name: str) -> int:
        """The number of a class from its name, or from a number in quotes."""
        names = self.config.names
        if name in names:
            return names.index(name)
        if name.isdecimal():
            return int(name)
        if not names:
            raise UserError(
                f"the class {name!r} is not known: this model keeps no names, give a number from 0 to "
                f"{self.config.num_classes - 1}"
            )
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names[:8])
        raise UserError(
            f"the class {name!r} is not one of the model's {len(names)}; near it, or among them, are "
            f"{', '.join(near)}"
        )


def arranged(layout: Sequence[SceneObject], most: int) -> Layout:
    """The `most` largest objects, largest first, whatever order they were given in."""

    def place(item: SceneObject) -> tuple[float, int, Box]:
        return -box_area(item["box"]), item["label"], item["box"]

    return sorted(_plain(layout), key=place)[:most]


def _plain(layout: Sequence[SceneObject]) -> Layout:
    """The same with tuples as boxes; from JSON they come as lists."""
    plain: Layout = []
    for item in layout:
        x0, y0, x1, y1 = map(float, item["box"])
        plain.append({"label": item["label"], "box": (x0, y0, x1, y1)})
    return plain


def _frame(top: int, left: int, size: Grid, grid: Grid) -> Box:
    """A window of `size` cells at (top, left) as a part of the picture of `grid` cells."""
    return (
        left / grid[1],
        top / grid[0],
        min((left + size[1]) / grid[1], 1.0),
        min((top + size[0]) / grid[0], 1.0),
    )


def _check_object(item: SceneObject, num_classes: int) -> None:
    label, box = item["label"], item["box"]
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
        raise UserError(
            f"the label {label!r} is not one of the {num_classes} classes (0 to {num_classes - 1}) that the "
            "model was built for"
        )
    is_four = isinstance(box, Sequence) and not isinstance(box, str) and len(box) == 4
    # By their size, since a whole number from JSON may be too large to be asked whether it is finite.
    if not is_four or not all(isinstance(x, int | float) and abs(x) < _LARGEST for x in box):
        raise UserError(f"the box {box!r} is not four numbers [x0, y0, x1, y1] in [0, 1]")
    x0, y0, x1, y1 = box
    if min(box) < 0 or max(box) > 1:
        raise UserError(
            f"the box {list(box)} leaves the picture; boxes are shares of its width and height, in [0, 1]"
        )
    if x1 <= x0 or y1 <= y0:
        raise UserError(f"the box {list(box)} has no area; write [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
