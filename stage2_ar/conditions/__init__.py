"""Conditions: what is said to the transformer before, or beside, the codes."""

from __future__ import annotations

from typing import assert_never

from stage2_ar.conditions.base import Condition, crop_prefix
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    ConditionConfig,
    NoConditionConfig,
    SegmentationConditionConfig,
)
from stage2_ar.conditions.label import ClassCondition
from stage2_ar.conditions.none import NoCondition
from stage2_ar.conditions.segmentation import SegmentationCondition

__all__ = ["Condition", "ConditionConfig", "build_condition", "crop_prefix"]


def build_condition(
    config: NoConditionConfig | ClassConditionConfig | SegmentationConditionConfig,
    *,
    width: int,
    downsample_factor: int,
) -> Condition:
    """The condition that a config describes, for a transformer of `width` and a tokenizer's factor.

    A condition that shares the transformer's table still needs `attach(transformer.token_embedding)`.
    """
    match config:
        case NoConditionConfig():
            return NoCondition(config, width=width)
        case ClassConditionConfig():
            return ClassCondition(config, width=width)
        case SegmentationConditionConfig():
            return SegmentationCondition(config, width=width, downsample_factor=downsample_factor)
        case _:
            assert_never(config)
