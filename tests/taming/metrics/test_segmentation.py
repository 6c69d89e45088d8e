"""Intersection over union, counted by hand."""

from __future__ import annotations

import pytest
import torch

from taming.metrics.segmentation import mean_iou, overlap_counts


def test_counts_and_means() -> None:
    wanted = torch.tensor([[[0, 0], [1, 1]], [[2, 2], [2, 2]]])
    found = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [2, 2]]])
    both, either = overlap_counts(found, wanted, 4)
    assert both.tolist() == [[1, 2, 0, 0], [0, 0, 4, 0]]
    assert either.tolist() == [[2, 3, 0, 0], [0, 0, 4, 0]]
    # Labels that occur in neither map do not count.
    assert mean_iou(both, either).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1.0])
    assert float(mean_iou(both.sum(0), either.sum(0))) == pytest.approx((1 / 2 + 2 / 3 + 1) / 3)
