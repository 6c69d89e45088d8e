"""Conditions: what is said to the transformer before, or beside, the codes."""

from __future__ import annotations

from typing import assert_never

from stage2_ar.conditions.base import Condition, crop_prefix
from stage2_ar.conditions.codes import CodesCondition
from stage2_ar.conditions.combined import CombinedCondition
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CodesConditionConfig,
    CombinedConditionConfig,
    ConditionConfig,
    CoordinatesConditionConfig,
    DepthConditionConfig,
    ImageConditionConfig,
    NoConditionConfig,
    SegmentationConditionConfig,
    SingleCondition,
)
from stage2_ar.conditions.coordinates import build_coordinates_condition
from stage2_ar.conditions.depth import DepthCondition
from stage2_ar.conditions.image import build_image_condition
from stage2_ar.conditions.label import ClassCondition
from stage2_ar.conditions.none import NoCondition
from stage2_ar.conditions.object_tokens import build_objects_condition
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from stage2_ar.conditions.segmentation import SegmentationCondition
from stage2_ar.conditions.text_config import TextConditionConfig
from stage2_ar.conditions.words import build_text_condition

__all__ = ["Condition", "ConditionConfig", "build_condition", "crop_prefix"]


def build_condition(
    config: SingleCondition | CombinedConditionConfig, *, width: int, downsample_factor: int
) -> Condition:
    """The condition that a config describes, for a transformer of `width` and a tokenizer's factor.

    A condition that shares the transformer's table still needs `attach(transformer.token_embedding)`.
    Raises ConfigError for a combination that cannot be.
    """
    match config:
        case NoConditionConfig():
            return NoCondition(config, width=width)
        case ClassConditionConfig():
            return ClassCondition(config, width=width)
        case SegmentationConditionConfig():
            return SegmentationCondition(config, width=width, downsample_factor=downsample_factor)
        case DepthConditionConfig():
            return DepthCondition(config, width=width, downsample_factor=downsample_factor)
        case ImageConditionConfig():
            return build_image_condition(config, width=width, downsample_factor=downsample_factor)
        case CodesConditionConfig():
            return CodesCondition(config, width=width, downsample_factor=downsample_factor)
        case CoordinatesConditionConfig():
            return build_coordinates_condition(config, width=width, downsample_factor=downsample_factor)
        case ObjectsConditionConfig():
            return build_objects_condition(config, width=width)
        case TextConditionConfig():
            return build_text_condition(config, width=width)
        case CombinedConditionConfig():
            parts = [
                build_condition(part, width=width, downsample_factor=downsample_factor)
                for part in config.conditions
            ]
            return CombinedCondition(parts, dropout=config.dropout)
        case _:
            assert_never(config)
