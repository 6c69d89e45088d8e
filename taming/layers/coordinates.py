"""Places as sine waves: what an implicit function is a function of.

Axes: h w cells or pixels, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CoordinateEncoding(nn.Module):
    """sin(Linear(coordinates)), learned (ViTGAN, Lee et al. 2021, arXiv:2107.04589).

    Weights and phases start from U(-sqrt(9/2), sqrt(9/2)), the bound of the root of 9 / fan-in: no more than
    a wave or so across the field, so that the function between two pixels is as smooth as between neighbours.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, width)
        bound = math.sqrt(9 / 2)
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.uniform_(self.linear.bias, -bound, bound)

    def forward(self, height: int, width: int) -> Tensor:
        """The encodings (height * width, D) of a field's cells in raster order."""
        weight = self.linear.weight
        # In bf16 the phases of neighbouring pixels would be the same number.
        with torch.autocast(weight.device.type, enabled=False):
            return torch.sin(self.linear(centres(height, width, device=weight.device, dtype=weight.dtype)))


def centres(
    height: int, width: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """(row, column) of each cell's centre, (height * width, 2), the field's edges at -1 and 1.

    The cells of a finer grid lie between those of a coarser one as interpolation with align_corners=False
    has them.
    """
    rows, columns = (
        (torch.arange(count, device=device, dtype=dtype) * 2 + 1) / count - 1 for count in (height, width)
    )
    return torch.cartesian_prod(rows, columns)
