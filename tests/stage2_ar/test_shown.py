from __future__ import annotations

import torch

from stage2_ar.conditions import build_condition
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CombinedConditionConfig,
    DepthConditionConfig,
    ImageConditionConfig,
    SegmentationConditionConfig,
)
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from stage2_ar.conditions.text_config import TextConditionConfig, WordsConfig
from stage2_ar.shown import condition_rows


def test_each_part_that_is_a_picture_has_its_row() -> None:
    parts = [
        ClassConditionConfig(num_classes=2),
        DepthConditionConfig(),
        ImageConditionConfig(source="low_resolution", scale=4),
        SegmentationConditionConfig(num_labels=3),
    ]
    condition = build_condition(CombinedConditionConfig(conditions=parts), width=8, downsample_factor=4)
    image = torch.full((2, 3, 8, 8), 0.5)
    image[1] = -1
    depth = torch.ones(2, 1, 8, 8)
    batch = {
        "label": torch.zeros(2, dtype=torch.int64),
        "image": image,
        "depth": depth,
        "segmentation": torch.zeros(2, 8, 8, dtype=torch.int64),
    }
    shown = condition_rows(condition, batch, (8, 8))
    assert [row.shape for row in shown] == [(2, 3, 8, 8)] * 3
    assert torch.equal(shown[0], torch.ones(2, 3, 8, 8))
    assert torch.equal(shown[1], image)
    assert len(shown[2].flatten(2).unique(dim=2)[0, 0]) == 1


def test_what_is_no_picture_is_not_shown() -> None:
    condition = build_condition(ClassConditionConfig(num_classes=2), width=8, downsample_factor=4)
    batch = {"label": torch.zeros(2, dtype=torch.int64), "segmentation": torch.zeros(2, 8, 8).long()}
    assert condition_rows(condition, batch, (8, 8)) == []
    # Codes that were stored without the pictures.
    edges = build_condition(ImageConditionConfig(source="edges"), width=8, downsample_factor=4)
    assert condition_rows(edges, {"codes": torch.zeros(2, 2, 2)}, (8, 8)) == []


def test_layouts_and_captions_are_drawn() -> None:
    objects = ObjectsConditionConfig(num_classes=2, names=("cat", "dog"))
    text = TextConditionConfig(encoder=WordsConfig(vocabulary=("a", "cat")))
    condition = build_condition(
        CombinedConditionConfig(conditions=[objects, text]), width=8, downsample_factor=4
    )
    layouts = [[{"label": 1, "box": (0.25, 0.5, 0.75, 1.0)}], []]
    drawn, written = condition_rows(condition, {"objects": layouts, "text": ["a cat", "a"]}, (32, 32))
    assert drawn.shape == written.shape == (2, 3, 32, 32)
    assert (drawn[0, :, 16, 8:23].amin(0) < 1).all()  # the upper edge of the box
    assert (drawn[1] == 1).all()
    assert not torch.equal(written[0], written[1])
