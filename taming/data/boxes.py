"""Boxes of objects under the crops and mirror images of their pictures.

A box is (x0, y0, x1, y1) in [0, 1]: shares of the picture's width and height, y down.
"""

from __future__ import annotations

from collections.abc import Sequence

from taming.data.scenes import SceneObject

Box = tuple[float, float, float, float]


def crop_objects(
    objects: Sequence[SceneObject], frame: Box, *, least: float = 0.0, visible: float = 0.0
) -> list[SceneObject]:
    """Objects of a whole picture as objects of its part `frame`, their boxes cut off at its edges.

    Those are dropped of which no more than the share `least` of the part's area is left, or less than the
    share `visible` of their own.
    """
    part_area = box_area(frame)
    seen: list[SceneObject] = []
    for item in objects:
        box = crop_box(item["box"], frame)
        if box is None or box_area(box) <= least:
            continue
        # A hair of slack: what lies wholly inside is wholly visible, whatever rounding does.
        if box_area(box) * part_area < (visible - 1e-9) * box_area(item["box"]):
            continue
        seen.append({"label": item["label"], "box": box})
    return seen


def crop_box(box: Box, frame: Box) -> Box | None:
    """The part of a box that lies in `frame`, relative to it; None where there is none."""
    left, top, right, bottom = frame
    x0, x1 = ((min(max(x, left), right) - left) / (right - left) for x in (box[0], box[2]))
    y0, y1 = ((min(max(y, top), bottom) - top) / (bottom - top) for y in (box[1], box[3]))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def box_area(box: Box) -> float:
    """The share of the picture that a box takes."""
    return (box[2] - box[0]) * (box[3] - box[1])


def mirror_objects(objects: Sequence[SceneObject]) -> list[SceneObject]:
    """The same objects in the picture's mirror image, left for right."""
    return [{"label": item["label"], "box": mirror_box(item["box"])} for item in objects]


def mirror_box(box: Sequence[float]) -> Box:
    """A box in the picture's mirror image."""
    x0, y0, x1, y1 = box
    return 1 - x1, y0, 1 - x0, y1
