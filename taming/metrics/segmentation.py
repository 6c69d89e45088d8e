"""How well label maps agree.

Axes: B maps, H W pixels, L labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlap_counts(found: Tensor, wanted: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """(intersections (B, L), unions (B, L)) int64 in pixels, of each label of maps (B, H, W) int64."""
    maps = len(found)
    first = torch.arange(maps, device=found.device)[:, None] * num_labels

    def counts(labels: Tensor, keep: Tensor | None = None) -> Tensor:
        flat = labels.flatten(1) + first
        flat = flat if keep is None else flat[keep.flatten(1)]
        return torch.bincount(flat.flatten(), minlength=maps * num_labels).view(maps, num_labels)

    both = counts(found, found == wanted)
    return both, counts(found) + counts(wanted) - both


def mean_iou(intersections: Tensor, unions: Tensor) -> Tensor:
    """(..., L) counts -> mean over the labels that occur of intersection over union, (...) in [0, 1]."""
    occurs = unions > 0
    share = intersections / unions.clamp(min=1)
    return (share * occurs).sum(-1) / occurs.sum(-1).clamp(min=1)
