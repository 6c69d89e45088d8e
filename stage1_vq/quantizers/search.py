"""Exact search for the best code of each latent, in flat memory.

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENTS_PER_TILE, CODES_PER_TILE = 2048, 2048
"""Scores that the search holds at once: 16 MiB."""
BLOCK = 64
"""Scores whose minimum is taken before anything is asked about where it lies."""


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the code (K, D) nearest to each latent (N, D); the lower index on a tie.

    |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, and |z|^2 is the same for all codes.
    """
    # In parts: the squares of a large table would be as large as it is.
    norms = torch.cat([codes.square().sum(1) for codes in codebook.detach().split(CODES_PER_TILE)])
    return _smallest_score(latents, codebook, norms / 2)


def largest_logit(latents: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Index (N,) of the largest z.w + b, for weight (K, D) and bias (K,); the lower index on a tie."""
    offset = weight.new_zeros(len(weight)) if bias is None else -bias
    return _smallest_score(latents, weight, offset)


@torch.no_grad()
def _smallest_score(latents: Tensor, codebook: Tensor, offset: Tensor) -> Tensor:
    """Index (N,) of the smallest offset - z.e over the codes, offset (K,); the lower index on a tie.

    The (N, K) scores are never held at once: a tile of them is made, and its smallest kept, while it lies in
    the cache.
    """
    if torch.compiler.is_exporting():
        # A graph for other programs has no loop over tiles: one product, whatever the number of latents.
        return (offset - latents @ codebook.t()).argmin(dim=1)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    width = _whole_blocks(min(CODES_PER_TILE, len(codebook)))
    memory = torch.empty(min(LATENTS_PER_TILE, len(latents)) * width, device=latents.device)
    for row in range(0, len(latents), LATENTS_PER_TILE):
        part = latents[row : row + LATENTS_PER_TILE]
        best = best_index = None
        for first in range(0, len(codebook), CODES_PER_TILE):
            codes = codebook[first : first + CODES_PER_TILE]
            columns = _whole_blocks(len(codes))
            tile = memory[: len(part) * columns].view(len(part), columns)
            tile[:, len(codes) :] = torch.inf
            scores = tile[:, : len(codes)]
            # In two passes: addmm writes its bias into the whole tile first, which takes longer.
            torch.mm(part, codes.t(), out=scores)
            torch.sub(offset[first : first + CODES_PER_TILE], scores, out=scores)
            smallest, index = _row_minimum(tile)
            if best is None or best_index is None:
                best, best_index = smallest, index
            else:
                closer = smallest < best
                best = torch.where(closer, smallest, best)
                best_index = torch.where(closer, index + first, best_index)
        if best_index is not None:
            indices[row : row + LATENTS_PER_TILE] = best_index
    return indices


def _row_minimum(tile: Tensor) -> tuple[Tensor, Tensor]:
    """(smallest, its index), both (N,), of the rows of (N, whole blocks); the lower index on a tie.

    A minimum without its index is several times faster: first the blocks', then the index within one block.
    """
    blocks = tile.unflatten(1, (-1, BLOCK))
    smallest, block = blocks.amin(2).min(1)
    within = blocks[torch.arange(len(tile), device=tile.device), block].min(1).indices
    return smallest, block * BLOCK + within


def _whole_blocks(count: int) -> int:
    return -(-count // BLOCK) * BLOCK
