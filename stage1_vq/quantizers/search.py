"""Exact search for the best code of each latent, in flat memory.

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENTS_PER_TILE, CODES_PER_TILE = 2048, 2048
"""Scores that the search holds at once: 16 MiB."""


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the code (K, D) nearest to each latent (N, D); the lower index on a tie.

    |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, and |z|^2 is the same for all codes.
    """
    return smallest_score(latents, codebook, codebook.square().sum(1), -2.0)


def largest_logit(latents: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Index (N,) of the largest z.w + b, for weight (K, D) and bias (K,); the lower index on a tie."""
    offset = weight.new_zeros(len(weight)) if bias is None else -bias
    return smallest_score(latents, weight, offset, -1.0)


@torch.no_grad()
def smallest_score(latents: Tensor, codebook: Tensor, offset: Tensor, scale: float) -> Tensor:
    """Index (N,) of the smallest offset + scale * z.e over the codes; the lower index on a tie.

    The (N, K) scores are never held at once: a tile of them is made, and its smallest kept, while it lies in
    the cache.
    """
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    tile = torch.empty(LATENTS_PER_TILE * CODES_PER_TILE, device=latents.device)
    for row in range(0, len(latents), LATENTS_PER_TILE):
        part = latents[row : row + LATENTS_PER_TILE]
        best = best_index = None
        for first in range(0, len(codebook), CODES_PER_TILE):
            codes = codebook[first : first + CODES_PER_TILE]
            scores = tile[: len(part) * len(codes)].view(len(part), len(codes))
            torch.addmm(offset[first : first + CODES_PER_TILE], part, codes.t(), alpha=scale, out=scores)
            # min with indices is a third faster than argmin on a CPU.
            smallest, index = scores.min(dim=1)
            if best is None or best_index is None:
                best, best_index = smallest, index
            else:
                closer = smallest < best
                best = torch.where(closer, smallest, best)
                best_index = torch.where(closer, index + first, best_index)
        if best_index is not None:
            indices[row : row + LATENTS_PER_TILE] = best_index
    return indices
