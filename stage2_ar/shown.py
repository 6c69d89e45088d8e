"""What a condition asks for, as pictures to look at beside the samples.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stage1_vq.inputs import visible_channels
from stage2_ar.conditions.base import Condition
from taming.data.label_colours import paint_labels
from taming.types import Batch


def condition_rows(condition: Condition, batch: Batch, size: tuple[int, int]) -> list[Tensor]:
    """(B, 3, H, W) in [-1, 1] of `size` for each condition that is a picture or a map; on the CPU.

    What the condition makes of the batch's pictures (edges, a low resolution) is shown as it is used.
    """
    batch = condition.derive(batch)
    painted = (_painted(key, batch[key]) for key in condition.keys.values() if key in batch)
    return [
        functional.interpolate(row, size, mode="nearest").expand(-1, 3, -1, -1)
        for row in painted
        if row is not None
    ]


def _painted(key: str, value: Tensor) -> Tensor | None:
    """(B, 1 or 3, h, w) in [-1, 1] of what a batch holds under `key`; None where that is no picture."""
    match key:
        case "segmentation":
            return paint_labels(value.cpu())
        case "depth" | "edges":
            return value.float().cpu() * 2 - 1
        case "condition_image" | "low_resolution":
            return torch.clamp(visible_channels(value.float().cpu()), -1, 1)
        case _:
            return None
