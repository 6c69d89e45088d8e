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
