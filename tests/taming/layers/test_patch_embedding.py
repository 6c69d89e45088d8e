"""Overlapping patches: how many, what each sees, and a convolution beside them; encoded places."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from taming.layers.coordinates import CoordinateEncoding, centres
from taming.layers.patch_embedding import PatchEmbedding


@pytest.mark.parametrize("overlap", [0, 1, 2])
def test_it_is_a_convolution_over_a_padded_picture(overlap: int):
    torch.manual_seed(0)
    layer, images = PatchEmbedding(3, 5, 4, overlap=overlap), torch.randn(2, 3, 8, 12)
    tokens = layer(images)
    assert tokens.shape == (2, 6, 5)
    assert layer.grid(8, 12) == (2, 3)
    kernel = layer.linear.weight.view(5, 3, 4 + 2 * overlap, 4 + 2 * overlap)
    wanted = F.conv2d(images, kernel, layer.linear.bias, stride=4, padding=overlap)
    torch.testing.assert_close(tokens, wanted.flatten(2).mT)


def tokens_reached(overlap: int, row: int, column: int) -> set[int]:
    torch.manual_seed(0)
    layer, images = PatchEmbedding(1, 4, 4, overlap=overlap), torch.zeros(1, 1, 12, 12)
    images[0, 0, row, column] = 1
    moved = (layer(images) - layer(torch.zeros(1, 1, 12, 12)))[0].abs().sum(1) > 0
    return set(moved.nonzero().flatten().tolist())


def test_a_pixel_at_a_border_of_patches_reaches_its_neighbours():
    assert tokens_reached(0, 3, 1) == {0}
    assert tokens_reached(2, 3, 1) == {0, 3}  # the lower border of the first patch
    assert tokens_reached(2, 3, 4) == {0, 1, 3, 4}  # a corner
    assert tokens_reached(1, 5, 5) == {4}


def test_places_are_the_centres_of_cells():
    torch.testing.assert_close(
        centres(2, 4),
        torch.tensor([[y, x] for y in (-0.5, 0.5) for x in (-0.75, -0.25, 0.25, 0.75)]),
    )
    # Those of a finer grid lie where interpolation puts them.
    fine, coarse = centres(8, 8)[:8, 1], centres(4, 4)[:4, 1]
    resized = F.interpolate(coarse[None, None], scale_factor=2, mode="linear", align_corners=False)[0, 0]
    torch.testing.assert_close(resized[1:-1], fine[1:-1])


def test_encodings_are_waves_within_the_published_bounds():
    torch.manual_seed(0)
    encoding = CoordinateEncoding(64)
    bound = math.sqrt(9 / 2)
    weight = encoding.linear.weight
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.9 * bound
    wanted = encoding.linear(centres(3, 5)).sin()
    torch.testing.assert_close(encoding(3, 5), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoding(3, 5), wanted)
