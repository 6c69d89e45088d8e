from __future__ import annotations

import pytest

from taming.data.boxes import crop_objects, mirror_objects
from taming.data.scenes import SceneObject

INSIDE: SceneObject = {"label": 1, "box": (0.3, 0.5, 0.4, 0.75)}
ACROSS: SceneObject = {"label": 2, "box": (0.0, 0.0, 0.5, 1.0)}
OUTSIDE: SceneObject = {"label": 3, "box": (0.8, 0.0, 1.0, 0.2)}


def test_boxes_of_a_part_are_cut_off_at_its_edges() -> None:
    seen = crop_objects([INSIDE, ACROSS, OUTSIDE], (0.25, 0.5, 0.75, 1.0))
    assert [item["label"] for item in seen] == [1, 2]
    assert seen[0]["box"] == pytest.approx((0.1, 0.0, 0.3, 0.5))
    assert seen[1]["box"] == pytest.approx((0.0, 0.0, 0.5, 1.0))
    assert crop_objects([INSIDE], (0.25, 0.5, 0.75, 1.0), least=0.11) == []
    assert crop_objects([INSIDE, OUTSIDE], (0.0, 0.0, 1.0, 1.0)) == [INSIDE, OUTSIDE]


def test_a_mirror_image_of_a_mirror_image() -> None:
    (once,) = mirror_objects([INSIDE])
    assert once["box"] == pytest.approx((0.6, 0.5, 0.7, 0.75))
    (twice,) = mirror_objects([once])
    assert twice["box"] == pytest.approx(INSIDE["box"])
