"""The distance of patches: a closed form, what it notices and at which scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taming.errors import UserError
from taming.metrics.sliced_wasserstein import SlicedWasserstein, _distance, _doubled, _halved


def distances(real: Tensor, generated: Tensor, batch: int = 50) -> dict[str, float]:
    found = SlicedWasserstein((real.shape[2], real.shape[3]), real.shape[1])
    for part in real.split(batch):
        found.add_real(part)
    for part in generated.split(batch):
        found.add_generated(part)
    return found.value()


def test_points_that_were_moved_are_as_far_as_they_were_moved() -> None:
    points = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    shift = torch.zeros(30)
    shift[0] = 5.0
    # |<shift, direction>| of a unit direction of D dimensions: |shift| * E|first coordinate|.
    directions = torch.randn(20000, 30, generator=torch.Generator().manual_seed(1))
    wanted = 5 * float((directions[:, 0] / directions.norm(dim=1)).abs().mean())
    assert _distance(points, points + shift) == pytest.approx(wanted, rel=0.1)
    assert _distance(points, points.flip(0)) == pytest.approx(0, abs=1e-6)
    assert _distance(points, points[:200]) < 0.1 * wanted


def test_a_pyramid_puts_flat_pictures_together_again() -> None:
    flat = torch.full((1, 2, 16, 16), 0.7)
    torch.testing.assert_close(_doubled(_halved(flat)), flat)


def test_noise_shows_in_the_finest_band_and_layout_in_the_coarsest() -> None:
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(120, 3, 4, 4, generator=generator) - 0.5
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    real, other = smooth.chunk(2)
    same = distances(real, other)
    assert list(same) == ["32", "16", "mean"]
    assert same["mean"] == pytest.approx((same["32"] + same["16"]) / 2)
    noisy = distances(real, other + 0.3 * torch.randn(60, 3, 32, 32, generator=generator))
    assert noisy["32"] > 1.5 * same["32"]
    ramp = torch.linspace(-1, 1, 32)[:, None].expand(60, 3, 32, 32)
    tilted = distances(real, 0.2 * other + 0.8 * ramp)
    assert tilted["16"] > 2 * same["16"]
    # What is the same everywhere in a picture is in none but the coarsest band.
    offsets = 0.4 * torch.rand(60, 3, 1, 1, generator=generator)
    brighter = distances(real, other + offsets)
    assert brighter["16"] - same["16"] > 4 * abs(brighter["32"] - same["32"])
    assert distances(real, other, batch=7) == pytest.approx(same, rel=0.2)
    assert distances(real, other) == same


def test_what_cannot_be_measured_says_so() -> None:
    with pytest.raises(UserError, match="smaller than the patches"):
        SlicedWasserstein((6, 32))
    with pytest.raises(UserError, match="pictures of both sets"):
        SlicedWasserstein((8, 8)).value()
    assert [band for band, _ in SlicedWasserstein((64, 64)).bands] == [64, 32, 16]
    assert [band for band, _ in SlicedWasserstein((63, 64)).bands] == [63]
