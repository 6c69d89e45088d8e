"""The shipped configs of picture-like conditions, as small as they are for small data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage2_ar.conditions import build_condition
from stage2_ar.config import ARTrainConfig
from taming.config import load_config

OPTIONS: dict[str, list[str]] = {
    "depth_64": [],
    "edges_64": [],
    "super_resolution_64": ["condition.scale=8"],
    "pairs_64": ["data.condition_image=seasons", "condition.channels=1"],
    "class_segmentation_64": ["condition.conditions.0.num_classes=7", "condition.conditions.1.num_labels=9"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_shipped_config_builds(name: str) -> None:
    overrides = ["data.root=/nowhere", "tokenizer=/nowhere", *OPTIONS[name]]
    config = load_config(ARTrainConfig, name, overrides, group="stage2")
    assert config.description.count("\n") == 0
    condition: Any = build_condition(config.condition, width=config.transformer.width, downsample_factor=4)
    assert condition.has_null
    prefix = condition(condition.example(1, (16, 16)), (16, 16))
    assert prefix.cells is not None
    assert torch.isfinite(prefix.cells).all()
    if name == "class_segmentation_64":
        assert condition.members[0].num_classes == 7
        assert condition.members[1].num_labels == 9
