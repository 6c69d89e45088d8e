"""Seams: none in real scenes, plain ones where halves are glued, and the figures by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from taming.data.config import ScenesDataConfig
from taming.data.dataset import ScenesDataset
from taming.metrics.seams import colour_jumps, periodicity, seam_figure


@pytest.fixture(scope="module")
def scenes() -> Tensor:
    data = ScenesDataset(ScenesDataConfig(size=[64, 256], num_validation=24), "validation")
    return data.batch(range(24), [-1] * 24)["image"].float() / 127.5 - 1


def _glued(images: Tensor, width: int) -> Tensor:
    """Every `width` columns from another picture."""
    parts = images.split(width, dim=-1)
    return torch.cat([part.roll(number, 0) for number, part in enumerate(parts)], dim=-1)


def test_real_scenes_have_no_seams(scenes: Tensor) -> None:
    figure = seam_figure(scenes, columns=[64, 128, 192], step=4)
    assert abs(figure.ratio - 1) < 3 * figure.error
    assert figure.error < 0.15
    assert periodicity(scenes, 64, "columns", step=4) < 2


def test_glued_pictures_have(scenes: Tensor) -> None:
    glued = _glued(scenes, 64)
    figure = seam_figure(glued, columns=[64, 128, 192], step=4)
    assert figure.ratio - 3 * figure.error > 3
    assert periodicity(glued, 64, "columns", step=4) > 10
    # The same along rows, and where nobody knows where to look.
    turned = glued.transpose(2, 3)
    assert seam_figure(turned, rows=[64, 128, 192], step=4) == figure
    assert periodicity(turned, 32, "rows", step=4) > 10


def test_a_faint_seam_is_found_beside_the_same_pictures_without(scenes: Tensor) -> None:
    shifted = scenes.clone()
    for index, part in enumerate(shifted.split(64, dim=-1)):
        part += 0.02 * (index % 2)  # five grey levels of 255
    alone = seam_figure(shifted, columns=[64, 128, 192], step=4)
    beside = seam_figure(shifted, columns=[64, 128, 192], step=4, reference=scenes)
    assert beside.error < alone.error / 2
    assert beside.ratio - 3 * beside.error > 1
    same = seam_figure(scenes, columns=[64, 128, 192], step=4, reference=scenes)
    assert same.ratio == pytest.approx(1)
    assert same.error == pytest.approx(0, abs=1e-9)


def test_figures_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0, 1.5, 5.5, 6.0, 7.0, 7.25]]]])
    assert colour_jumps(image, "columns").tolist() == [[1, 0.5, 4, 0.5, 1, 0.25]]
    figure = seam_figure(image, columns=[3])  # beside it 1, 2, 4, 5 and 6
    assert figure.ratio == pytest.approx(4 / 0.65)
    assert math.isnan(figure.error)
    assert seam_figure(image, columns=[3], step=2).ratio == pytest.approx(4 / 1)
    ones = torch.ones(2, 3, 6, 6)
    assert colour_jumps(ones, "rows").tolist() == [[0] * 5] * 2


def test_what_cannot_be_measured(scenes: Tensor) -> None:
    for columns, words in (
        ([], "at least one border"),
        ([256], "not between 1 and 255"),
        ([0], "not between"),
    ):
        with pytest.raises(ValueError, match=words):
            seam_figure(scenes, columns=columns)
    with pytest.raises(ValueError, match="nothing to compare with"):
        seam_figure(scenes, columns=[4, 8, 12], step=4)
    for period in (6, 4, 132):
        with pytest.raises(ValueError, match=f"period {period} is not"):
            periodicity(scenes, period, "columns", step=4)
