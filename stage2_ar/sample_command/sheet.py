"""The sheet of `taming ar sample`: a row a condition, what was asked for before what was painted.

Axes: R conditions, N pictures (R x num), C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stage2_ar.conditions.base import Condition
from stage2_ar.shown import condition_rows
from taming.data.picture import tile


def sample_sheet(condition: Condition, conditions: Mapping[str, Any], images: Tensor, num: int) -> Tensor:
    """Pictures (N, C, H, W) in [-1, 1], `num` of each condition, as one sheet (C, H', W').

    Maps, pictures, layouts and captions stand first in their row. They are left out where the pictures are
    not rows of `num` (steps between two conditions), or are neither grey nor RGB.
    """
    if images.shape[1] not in (1, 3) or not conditions:
        return tile(images, columns=num)
    asked = condition_rows(condition, condition.read(conditions), (images.shape[2], images.shape[3]))
    if not asked or any(len(row) * num != len(images) for row in asked):
        return tile(images, columns=num)
    painted = images.expand(-1, 3, -1, -1).unflatten(0, (-1, num))  # (R, num, 3, H, W)
    rows = torch.cat([row[:, None].to(painted) for row in asked] + [painted], dim=1)
    return tile(rows.flatten(0, 1), columns=rows.shape[1])
