"""Muon for convolutions and for stacked matrices: momentum that is made orthogonal (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon; scaled to Adam's step as in Liu et al. 2025, arXiv:2502.16982).

torch.optim.Muon takes matrices only. Here each weight (out, ...) is shown to it as the matrix (out, rest).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ConvMuon(torch.optim.Muon):
    """torch's Muon over views of weights of two or more axes, which must lie where they will stay.

    A step has about the length of Adam's at the same learning rate. The state is one momentum a weight.
    `parts` says of each weight how many matrices of equal sizes are stacked in it (queries, keys and values,
    say), which are made orthogonal each by itself; 1 where it is not given.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        *,
        weight_decay: float = 0.0,
        parts: Sequence[int] | None = None,
    ) -> None:
        self._weights = list(weights)
        self._parts = [1] * len(self._weights) if parts is None else list(parts)
        views = []
        for weight, count in zip(self._weights, self._parts, strict=True):
            matrices = _matrix(weight.data, weight).chunk(count)
            assert matrices[0].data_ptr() == weight.data_ptr(), "a layout that gives no view as a matrix"
            assert len(matrices) == count
            views += [nn.Parameter(matrix) for matrix in matrices]
        super().__init__(views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self._views = views

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients of the weights; a weight without one stays."""
        views = iter(self._views)
        for weight, count in zip(self._weights, self._parts, strict=True):
            gradients: Sequence[Tensor | None] = [None] * count
            if weight.grad is not None:
                gradients = _matrix(weight.grad, weight).chunk(count)
            for gradient in gradients:
                next(views).grad = gradient
        result = super().step(closure)
        for view in self._views:
            view.grad = None
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights themselves."""
        for weight in self._weights:
            weight.grad = None


def _matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """(out, rest) with the numbers in the order in which those of `like` lie: Muon is blind to the order."""
    if not like.is_contiguous():
        assert like.ndim == 4
        tensor = tensor.permute(0, 2, 3, 1)  # channels last
    return tensor.reshape(len(tensor), -1)
