"""Of several pictures the best, by likelihood or by a user's score.

Axes: n pictures, C channels, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from taming.errors import UserError

Scorer = Callable[[Tensor], Tensor]
"""Pictures (n, C, H, W) in [-1, 1] -> (n,), higher is better."""


def candidate_seed(seed: int, candidate: int) -> int:
    """The seed of a picture's candidates: the first is the picture itself."""
    if candidate == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/candidate {candidate}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def check_best_of(best_of: int, has_scorer: bool, greedy: bool) -> None:
    """Raises UserError for settings that leave nothing to choose from."""
    if best_of < 1:
        raise UserError(f"best_of {best_of} is not at least 1")
    if best_of > 1 and greedy:
        raise UserError(f"greedy paints one picture only: best_of {best_of} has nothing to choose from")
    if best_of == 1 and has_scorer:
        raise UserError("a scorer chooses among several pictures: give best_of > 1")


def scores_of(scorer: Scorer, images: Tensor) -> Tensor:
    """What a scorer says of pictures, (n,) fp32 on the CPU. Raises UserError for anything else."""
    scores = torch.as_tensor(scorer(images)).detach().float().cpu()
    if scores.shape != images.shape[:1]:
        raise UserError(
            f"the scorer gave shape {tuple(scores.shape)} for {len(images)} pictures; it must give "
            f"({len(images)},), one number each"
        )
    if scores.isnan().any():
        raise UserError("the scorer gave nan; it must give a number for each picture")
    return scores
