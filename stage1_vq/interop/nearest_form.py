"""Quantizers as a search for the nearest row of a table: what programs can run that know no other.

Axes: K codes, D width of the model's codes, M width in which is searched, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stage1_vq.quantizers import (
    BSQQuantizer,
    EMAQuantizer,
    FSQQuantizer,
    GumbelQuantizer,
    IBQQuantizer,
    LFQQuantizer,
    NearestQuantizer,
    Quantizer,
    SimVQQuantizer,
)
from stage1_vq.quantizers.fsq import SLACK
from taming.errors import ArtifactError


@dataclass(frozen=True)
class NearestForm:
    """index(z) = argmin_k |z' - searched_k|, z' the latent z with zeros behind it up to width M >= D."""

    searched: Tensor
    """(K, M) fp32."""
    codes: Tensor
    """(K, D) fp32: what the decoder is given of index k; where equal to `searched`, one table does both."""
    directions_only: bool = False
    """Whether the length of a latent does not matter, since all rows have the same length."""

    @property
    def one_table(self) -> bool:
        return self.searched.shape == self.codes.shape and torch.equal(self.searched, self.codes)


@torch.no_grad()
def nearest_form(quantizer: Quantizer) -> NearestForm:
    """The search that `quantizer` comes to. Raises ArtifactError where it is no search of this kind."""
    codes = quantizer.codebook.detach().clone()
    match quantizer:
        case NearestQuantizer() | EMAQuantizer():
            return NearestForm(codes, codes, quantizer.config.l2_normalised)
        case SimVQQuantizer():
            return NearestForm(codes, codes)
        case LFQQuantizer() | BSQQuantizer():
            # Every code has all signs once, so the nearest one has the latent's: whatever its length.
            return NearestForm(codes, codes, directions_only=True)
        case IBQQuantizer() if quantizer.config.l2_normalised:
            return NearestForm(codes, codes, directions_only=True)
        case IBQQuantizer():
            return NearestForm(largest_dot_as_nearest(codes, codes.new_zeros(len(codes))), codes)
        case GumbelQuantizer():
            assert quantizer.proj.bias is not None
            weight, bias = quantizer.proj.weight[:, :, 0, 0].float(), quantizer.proj.bias.float()
            return NearestForm(largest_dot_as_nearest(weight, bias), codes)
        case FSQQuantizer():
            digits = torch.arange(len(codes))[:, None] // quantizer.places % quantizer.levels
            places = [fsq_places(int(levels)) for levels in quantizer.levels]
            searched = torch.stack([table[digits[:, i]] for i, table in enumerate(places)], dim=1)
            return NearestForm(searched.float(), codes)
        case _:
            kind = type(quantizer).__name__.removesuffix("Quantizer").lower()
            raise ArtifactError(
                f"a quantizer of kind {kind} does not search for the nearest row of one table, which is all "
                "that this format has; export to onnx, which takes every kind"
            )


def largest_dot_as_nearest(weight: Tensor, bias: Tensor) -> Tensor:
    """Rows (K, D + 1) nearest to (z, 0) where z.w_k + b_k is largest, for weights (K, D) and biases (K,).

    |(z, 0) - (w, r)|^2 = |z|^2 - 2 z.w + |w|^2 + r^2, so r^2 = C - |w|^2 - 2 b leaves the logits alone
    (Bachrach et al. 2014, "Speeding up the Xbox recommender system"). C makes the smallest r zero.
    """
    taken = weight.double().square().sum(1) + 2 * bias.double()
    height = (taken.max() - taken).sqrt()
    return torch.cat((weight, height[:, None].float()), dim=1)


def fsq_places(levels: int) -> Tensor:
    """(L,) fp64 places on the line of latents, whose midpoints are where FSQ's rounding changes its digit.

    Digit j begins at t_j = atanh((j - floor(L / 2) - 1/2 + o) / h) - s. Starting from the middle of the
    middle digit's interval, each further place mirrors the one before at the threshold between them; since
    the intervals widen outwards, it falls inside its own.
    """
    half, offset = (levels - 1) * (1 + SLACK) / 2, (levels + 1) % 2 / 2
    thresholds = torch.arange(1, levels, dtype=torch.float64) - levels // 2 - 0.5 + offset
    edges = torch.atanh(thresholds / half) - torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
    middle = levels // 2
    places = torch.empty(levels, dtype=torch.float64)
    places[middle] = (edges[middle - 1] + edges[middle]) / 2
    for digit in range(middle + 1, levels):
        places[digit] = 2 * edges[digit - 1] - places[digit - 1]
    for digit in reversed(range(middle)):
        places[digit] = 2 * edges[digit] - places[digit + 1]
    assert bool((places[:-1] < edges).all() and (places[1:] > edges).all())
    return places
