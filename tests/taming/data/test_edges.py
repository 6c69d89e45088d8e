"""Edges lie where luminance steps, are one pixel wide, and go on where a strong one begins."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taming.data.edges import _connected, canny


def test_a_step_is_one_line() -> None:
    images = torch.full((1, 3, 16, 16), -0.5)
    images[..., 8:] = 0.5
    edges = canny(images)
    assert edges.shape == (1, 1, 16, 16)
    assert edges.unique().tolist() == [-1, 1]
    on = edges[0, 0] > 0
    assert (on.sum(1) == 1).all()
    assert on[:, 7:9].sum() == 16
    assert torch.equal(canny(images.mT).mT, edges)


def test_faint_steps_count_only_where_a_strong_one_leads_to_them() -> None:
    images = torch.full((1, 1, 32, 32), -1.0)
    images[..., 16:] = -0.8  # a slope of 0.04 a pixel
    assert (canny(images) < 0).all()
    images[..., 16:] = torch.linspace(-0.8, -0.4, 32)[:, None]  # stronger and stronger downwards
    on = canny(images)[0, 0] > 0
    assert on[:, 15:17].any(1).all()


def test_flat_pictures_and_slow_ramps_have_none() -> None:
    assert (canny(torch.zeros(2, 3, 8, 8)) < 0).all()
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    assert (canny(ramp) < 0).all()


def test_pictures_do_not_depend_on_their_batch() -> None:
    images = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = canny(images)
    assert torch.equal(whole, torch.cat([canny(image[None]) for image in images]))
    with pytest.raises(ValueError, match="2x2"):
        canny(torch.zeros(1, 3, 1, 8))


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6])
def test_hysteresis_is_a_flood_from_strong_pixels(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weak = torch.rand(3, 1, 21, 17, generator=generator) < share
    strong = weak & (torch.rand(weak.shape, generator=generator) < 0.05)
    flooded = strong.clone()
    while True:
        grown = (functional.max_pool2d(flooded.float(), 3, stride=1, padding=1) > 0) & weak
        if torch.equal(grown, flooded):
            break
        flooded = grown
    assert torch.equal(_connected(strong, weak), flooded)
    assert strong.sum() < flooded.sum() < weak.sum()


def test_a_long_way_is_followed_to_its_end() -> None:
    """A serpentine of some thousand pixels with one strong end."""
    weak = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    weak[..., ::2, :] = True
    weak[..., 1::4, -1] = True
    weak[..., 3::4, 0] = True
    strong = torch.zeros_like(weak)
    strong[..., 0, 0] = True
    assert torch.equal(_connected(strong, weak), weak)
    assert not _connected(torch.zeros_like(weak), weak).any()
    assert not _connected(torch.zeros_like(weak), torch.zeros_like(weak)).any()
