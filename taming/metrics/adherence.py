"""How well pictures follow the segmentation maps that they were painted from.

Axes: B pictures, H W pixels, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Prototypes = Sequence[Sequence[Sequence[float]]]
"""Per label its typical colours, each RGB in 0..255 (taming.data.scenes.PROTOTYPES)."""


def adherence(images: Tensor, segmentation: Tensor, prototypes: Prototypes, border: int = 2) -> float:
    """Share of pixels whose colour is nearest to one of the typical colours of the label asked for.

    `images` are (B, 3, H, W) in [-1, 1], `segmentation` (B, H, W) int64 in [0, L). Pixels that have another
    label within `border` pixels (along rows, columns or diagonals) do not count, since a picture need not
    put a border down to the pixel. Colours are compared by squared RGB distance. Raises ValueError for other
    shapes and where no pixel is left to count.
    """
    if images.ndim != 4 or images.shape[1] != 3 or segmentation.shape != (images.shape[0], *images.shape[2:]):
        raise ValueError(
            f"adherence takes images (B, 3, H, W) and maps (B, H, W), not {tuple(images.shape)} and"
            f" {tuple(segmentation.shape)}"
        )
    nearest = nearest_labels(images, prototypes)
    counted = interior(segmentation, border)
    if not bool(counted.any()):
        raise ValueError(f"no pixel lies more than {border} pixels off all label borders; lower the border")
    return float((nearest == segmentation)[counted].float().mean())


def nearest_labels(images: Tensor, prototypes: Prototypes) -> Tensor:
    """The label to which each pixel's colour is nearest: images (B, 3, H, W) in [-1, 1] -> (B, H, W)."""
    colours, labels = [], []
    for label, group in enumerate(prototypes):
        colours += [list(colour) for colour in group]
        labels += [label] * len(group)
    table = torch.tensor(colours, dtype=torch.float32, device=images.device)  # (P, 3)
    owner = torch.tensor(labels, device=images.device)  # (P,)
    pixels = (images.float().clamp(-1, 1) + 1) * 127.5
    distance = (pixels[:, None] - table[None, :, :, None, None]).square().sum(dim=2)  # (B, P, H, W)
    return owner[distance.argmin(dim=1)]


def interior(segmentation: Tensor, border: int) -> Tensor:
    """(B, H, W) bool: every pixel of the frame within `border` pixels has the same label."""
    if border == 0:
        return torch.ones_like(segmentation, dtype=torch.bool)
    maps = segmentation[:, None].float()  # labels are small: exact in float32
    window = 2 * border + 1
    highest = F.max_pool2d(maps, window, stride=1, padding=border)
    lowest = -F.max_pool2d(-maps, window, stride=1, padding=border)
    return (highest == lowest)[:, 0]
