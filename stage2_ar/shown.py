"""What a condition asks for, as pictures to look at beside the samples.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stage1_vq.inputs import visible_channels
from stage2_ar.conditions.base import Condition
from stage2_ar.conditions.layout import LayoutCondition
from taming.data.label_colours import paint_labels
from taming.data.layout_picture import paint_layouts, paint_texts
from taming.types import Batch


def condition_rows(condition: Condition, batch: Batch, size: tuple[int, int]) -> list[Tensor]:
    """(B, 3, H, W) in [-1, 1] of `size` for each condition that can be looked at or read; on the CPU.

    What the condition makes of the batch's pictures (edges, a low resolution) is shown as it is used.
    """
    batch = condition.derive(batch)
    layouts = [part.config.names for part in condition.modules() if isinstance(part, LayoutCondition)]
    names = layouts[0] if layouts else ()
    painted = (_painted(key, batch[key], size, names) for key in condition.keys.values() if key in batch)
    return [
        functional.interpolate(row, size, mode="nearest").expand(-1, 3, -1, -1)
        for row in painted
        if row is not None
    ]


def _painted(key: str, value: Any, size: tuple[int, int], names: Sequence[str]) -> Tensor | None:
    """(B, 1 or 3, h, w) in [-1, 1] of what a batch holds under `key`; None where that is nothing to see."""
    match key:
        case "segmentation":
            return paint_labels(value.cpu())
        case "depth" | "edges":
            return value.float().cpu() * 2 - 1
        case "condition_image" | "low_resolution":
            return torch.clamp(visible_channels(value.float().cpu()), -1, 1)
        case "objects":
            return paint_layouts(value, size, names)
        case "text":
            return paint_texts(value, size)
        case _:
            return None
