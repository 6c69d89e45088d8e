from __future__ import annotations

import torch

from stage2_ar.conditions import build_condition
from stage2_ar.conditions.config import ClassConditionConfig
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from stage2_ar.sample_command.sheet import sample_sheet
from taming.data.picture import tile


def test_what_was_asked_stands_before_what_was_painted() -> None:
    condition = build_condition(ObjectsConditionConfig(num_classes=2), width=8, downsample_factor=4)
    layouts = [[{"label": 1, "box": (0.25, 0.25, 0.75, 1.0)}], []]
    images = torch.linspace(-1, 0, 4)[:, None, None, None].expand(4, 1, 32, 32)
    sheet = sample_sheet(condition, {"objects": layouts}, images, 2)
    assert sheet.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
    assert (sheet[:, 2:34, 2:34] < 1).any()  # the box
    assert (sheet[:, 36:68, 2:34] == 1).all()  # the empty layout
    assert (sheet[:, 2:34, 36:68] == images[0]).all()
    assert (sheet[:, 36:68, 70:102] == images[3]).all()


def test_without_rows_there_are_pictures_alone() -> None:
    condition = build_condition(ObjectsConditionConfig(num_classes=2), width=8, downsample_factor=4)
    images = torch.zeros(5, 3, 32, 32)  # five steps between two layouts
    assert torch.equal(sample_sheet(condition, {"objects": [[], []]}, images, 1), tile(images, columns=1))
    labels = build_condition(ClassConditionConfig(num_classes=2), width=8, downsample_factor=4)
    assert torch.equal(sample_sheet(labels, {"class": [0]}, images, 5), tile(images, columns=5))
    assert torch.equal(sample_sheet(labels, {}, images, 5), tile(images, columns=5))
