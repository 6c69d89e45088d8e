"""Fréchet distance of two sets of features, each taken as a Gaussian (Dowson and Landau 1982; as a figure of
merit of pictures Heusel et al. 2017, arXiv:1706.08500).

Axes: N samples, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taming.errors import UserError


class FeatureMoments:
    """Mean (D,) and covariance (D, D) of features that come in batches; in float64 on the CPU."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Count (N, D) of any dtype and device."""
        rows = features.detach().cpu().double()
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products.addmm_(rows.t(), rows)

    def packed(self) -> Tensor:
        """(1 + D + D * D,) float64: count, sum and products, to be added to those of other processes."""
        return torch.cat((self._sum.new_tensor([self.count]), self._sum, self._products.flatten()))

    def merge(self, packed: Tensor) -> None:
        """Count what another `packed` has counted."""
        count, total, products = packed.split((1, self._sum.numel(), self._products.numel()))
        self.count += int(count)
        self._sum += total
        self._products += products.view_as(self._products)

    @property
    def mean(self) -> Tensor:
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased. Raises UserError of fewer than two samples."""
        if self.count < 2:
            raise UserError(f"a Fréchet distance needs two pictures or more, not {self.count}")
        return (self._products - torch.outer(self._sum, self._sum) / self.count) / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), at least 0.

    C_a C_b has the eigenvalues of S C_b S with S = C_a^(1/2), which is symmetric: no complex square root.
    """
    cov_a, cov_b = a.covariance, b.covariance
    root = _square_root(cov_a)
    middle = root @ cov_b @ root
    eigenvalues = torch.linalg.eigvalsh((middle + middle.t()) / 2)
    overlap = eigenvalues.clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return max(float(distance), 0.0)


def _square_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.t()
