"""SSIM against the paper's formula window by window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taming.metrics.ssim import ssim


def reference(x: np.ndarray, y: np.ndarray) -> float:
    """One channel in [0, 1]: the mean over all 11x11 windows, each by itself."""
    offset = np.arange(11) - 5
    line = np.exp(-(offset**2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for row in range(x.shape[0] - 10):
        for column in range(x.shape[1] - 10):
            a, b = (t[row : row + 11, column : column + 11] for t in (x, y))
            ma, mb = (weight * a).sum(), (weight * b).sum()
            va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
            cov = (weight * (a - ma) * (b - mb)).sum()
            values.append(
                (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
            )
    return float(np.mean(values))


def test_it_is_the_papers_figure() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 14, 19, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    found = ssim(y, x)
    for n in range(2):
        a, b = ((t[n].double().numpy() + 1) / 2 for t in (x, y))
        wanted = np.mean([reference(a[c], b[c]) for c in range(3)])
        assert float(found[n]) == pytest.approx(wanted, abs=1e-6)


def test_equal_pictures_and_opposite_ones() -> None:
    x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert float(ssim(x, x)) == pytest.approx(1)
    assert float(ssim(-x, x)) < 0
    assert float(ssim(torch.zeros(1, 1, 11, 11), torch.zeros(1, 1, 11, 11))) == pytest.approx(1)
    with pytest.raises(ValueError, match="11x11"):
        ssim(x[..., :10], x[..., :10])
