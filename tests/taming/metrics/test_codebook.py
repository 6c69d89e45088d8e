"""Figures of code use and of reconstruction."""

from __future__ import annotations

import pytest
import torch

from taming.metrics.codebook import count_codes, perplexity, usage
from taming.metrics.psnr import psnr


def test_usage_and_perplexity_of_known_counts():
    counts = count_codes(torch.tensor([[0, 0], [3, 3]]), 8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    assert usage(counts).item() == pytest.approx(0.25)
    assert perplexity(counts).item() == pytest.approx(2.0)
    assert perplexity(torch.ones(8, dtype=torch.int64)).item() == pytest.approx(8.0)
    assert perplexity(torch.tensor([5, 0, 0])).item() == pytest.approx(1.0)


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 4, 4)
    found = psnr(target + torch.tensor([0.2, 0.02])[:, None, None, None], target)
    assert found.tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert psnr(target, target).tolist() == pytest.approx([100.0, 100.0])
