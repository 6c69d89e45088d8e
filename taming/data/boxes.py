"""Boxes of objects under the crops and mirror images of their pictures.

A box is (x0, y0, x1, y1) in [0, 1]: shares of the picture's width and height, y down.
"""

from __future__ import annotations

from collections.abc import Sequence

from taming.data.scenes import SceneObject

Box = tuple[float, float, float, float]


def crop_objects(objects: Sequence[SceneObject], frame: Box, *, least: float = 0.0) -> list[SceneObject]:
    """Objects of a whole picture as objects of its part `frame`, their boxes cut off at its edges.

    Those of which no more than the share `least` of the part's area is left are dropped.
    """
    left, top, right, bottom = frame
    seen: list[SceneObject] = []
    for item in objects:
        x0, y0, x1, y1 = item["box"]
        x0, x1 = ((min(max(x, left), right) - left) / (right - left) for x in (x0, x1))
        y0, y1 = ((min(max(y, top), bottom) - top) / (bottom - top) for y in (y0, y1))
        if (x1 - x0) * (y1 - y0) > least:
            seen.append({"label": item["label"], "box": (x0, y0, x1, y1)})
    return seen


def mirror_objects(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The same objects in the picture's mirror image, left for right."""
    return [{"label": item["label"], "box": mirror_box(item["box"])} for item in objects]


def mirror_box(box: Sequence[float]) -> Box:
    """A box in the picture's mirror image."""
    x0, y0, x1, y1 = box
    return 1 - x1, y0, 1 - x0, y1
