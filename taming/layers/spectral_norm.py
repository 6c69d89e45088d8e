"""Weights whose spectral norm is one, or what it was at the start.

W / sigma(W) (Miyato et al. 2018, arXiv:1802.05957), and sigma(W_init) * W / sigma(W) (ViTGAN, Lee et al.
2021, arXiv:2107.04589, "improved spectral normalization"). The weight is seen as a matrix (out, all other
axes).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

EPS = 1e-12
STARTING_ITERATIONS = 15
Module = TypeVar("Module", bound=nn.Module)


class SpectralNorm(nn.Module):
    """A parametrization: the largest singular value by a power iteration whose vectors are saved.

    Reading the weight in train mode takes one more step of the iteration; in eval mode nothing moves. sigma
    is computed in fp32 whatever the autocast, and its gradient is exact, twice.
    """

    def __init__(self, weight: Tensor, *, keep_initial: bool = False) -> None:
        super().__init__()
        matrix = weight.detach().flatten(1).float()
        self._u: Tensor
        self._v: Tensor
        self.initial: Tensor | None
        self.register_buffer("_u", F.normalize(matrix.new_empty(len(matrix)).normal_(), dim=0, eps=EPS))
        self.register_buffer("_v", F.normalize(matrix.t() @ self._u, dim=0, eps=EPS))
        # Saved models are first built without memory, where there is nothing to find, and slowly.
        for _ in range(0 if matrix.is_meta else STARTING_ITERATIONS):
            self._iterate(matrix)
        largest = torch.linalg.matrix_norm(matrix, 2) if keep_initial else None
        self.register_buffer("initial", largest)

    def forward(self, weight: Tensor) -> Tensor:
        with _full_precision(weight.device.type):
            matrix = weight.flatten(1)
            if self.training:
                self._iterate(matrix.detach())
                # Copies: the next forward moves the buffers, and the backward of this one still needs them.
                u, v = self._u.clone(), self._v.clone()
            else:
                # Of an average of weights the vectors are averages too, and no longer of length one.
                u, v = (F.normalize(vector, dim=0, eps=EPS) for vector in (self._u, self._v))
            sigma = u @ (matrix @ v)
            scale = 1 / sigma if self.initial is None else self.initial / sigma
            return weight * scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is assigned becomes the raw weight."""
        return weight

    @torch.no_grad()
    def _iterate(self, matrix: Tensor) -> None:
        self._u.copy_(F.normalize(matrix @ self._v, dim=0, eps=EPS))
        self._v.copy_(F.normalize(matrix.t() @ self._u, dim=0, eps=EPS))


def _full_precision(device: str) -> AbstractContextManager[Any]:
    # Models are first built on the device `meta`, which knows no autocast.
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def spectral_norm(module: Module, name: str = "weight", *, keep_initial: bool = False) -> Module:
    """Normalise `module.name` in place, and return the module.

    State: parametrizations.NAME.original is what is trained; parametrizations.NAME.0._u and ._v are the
    vectors, and .initial () is sigma(W_init) where `keep_initial` multiplies it in.
    """
    parametrize.register_parametrization(
        module, name, SpectralNorm(getattr(module, name), keep_initial=keep_initial)
    )
    return module


class SpectralConv2d(nn.Conv2d):
    """A convolution with weight / sigma(weight)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        spectral_norm(self)


class SpectralEmbedding(nn.Embedding):
    """A table with weight / sigma(weight)."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        spectral_norm(self)


def spectral_norms(module: nn.Module) -> dict[str, SpectralNorm]:
    """All of them in `module`, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, SpectralNorm)}


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """No power iteration in `module` moves: a forward sees the norms that the last one in train mode saw."""
    moving = [part for part in spectral_norms(module).values() if part.training]
    for part in moving:
        part.training = False
    try:
        yield
    finally:
        for part in moving:
            part.training = True


class Directions:
    """The power iterations' vectors of a module as they are now, to go back to.

    Every forward moves them: those of many micro-batches would otherwise move them further than one of the
    whole batch does.
    """

    def __init__(self, module: nn.Module) -> None:
        vectors = [vector for part in spectral_norms(module).values() for vector in (part._u, part._v)]
        self._before = [(vector, vector.clone()) for vector in vectors]

    def turn_back(self) -> None:
        """Give the vectors their values again."""
        for vector, before in self._before:
            vector.copy_(before)
