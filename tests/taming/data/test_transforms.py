from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from taming.data.transforms import (
    Crop,
    choose_crop,
    crop_depth,
    crop_labels,
    crop_picture,
    needed_size,
    uniforms,
)

sizes = st.tuples(st.integers(24, 90), st.integers(24, 90))
shares = st.floats(0, 1)


@settings(max_examples=80, deadline=None)
@given(
    picture=sizes,
    crop=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    resize=st.none() | st.integers(8, 90),
    position=st.tuples(shares, shares),
    scale=st.floats(0.5, 2),
    flip=st.booleans(),
    finer=st.sampled_from([1, 2]),
)
def test_picture_labels_and_depth_stay_aligned(
    picture: tuple[int, int],
    crop: tuple[int, int],
    resize: int | None,
    position: tuple[float, float],
    scale: float,
    flip: bool,
    finer: int,
) -> None:
    # One slanted border is drawn in picture, labels (perhaps finer than the picture) and depth.
    def drawn(factor: int) -> np.ndarray:
        y, x = np.mgrid[: picture[0] * factor, : picture[1] * factor]
        y, x = (y + 0.5) / factor, (x + 0.5) / factor
        return (x / picture[1] + 0.4 * y / picture[0]) > 0.7

    labels, coarse = drawn(finer).astype(np.int64), drawn(1)
    image = Image.fromarray(np.repeat((coarse * 255).astype(np.uint8)[..., None], 3, axis=2))
    chosen = choose_crop(
        picture, crop, resize=resize, upscale=True, position=position, scale=scale, flip=flip
    )
    seen = crop_picture(image, chosen, crop)[0] / 255
    told = crop_labels(labels, chosen, crop)
    deep = crop_depth(coarse.astype(np.float32), chosen, crop)
    assert seen.shape == told.shape == deep.shape == crop
    # Off the border, where no filter mixes the sides, all three must say the same.
    enlarged = max(1.0, crop[0] / picture[0] / chosen.height, crop[1] / picture[1] / chosen.width)
    reach = int(np.ceil(2.5 * enlarged)) + 1
    padded = np.pad(told, reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    inner = windows.max(axis=(2, 3)) == windows.min(axis=(2, 3))
    # A border that lies just outside of the crop is not seen in `told`.
    inner[: reach + 1], inner[-reach - 1 :], inner[:, : reach + 1], inner[:, -reach - 1 :] = (False,) * 4
    assert (np.abs(seen - told)[inner] < 0.13).all()
    assert (np.abs(deep - told)[inner] < 0.13).all()


@settings(max_examples=200, deadline=None)
@given(
    picture=sizes,
    crop=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    resize=st.none() | st.integers(1, 200),
    position=st.tuples(shares, shares),
    scale=st.floats(0.1, 4),
)
def test_a_crop_stays_within_the_picture_and_keeps_its_aspect(
    picture: tuple[int, int],
    crop: tuple[int, int],
    resize: int | None,
    position: tuple[float, float],
    scale: float,
) -> None:
    fits = crop[0] <= picture[0] and crop[1] <= picture[1]
    chosen = choose_crop(picture, crop, resize=resize, upscale=not fits, position=position, scale=scale)
    assert 0 <= chosen.top <= chosen.top + chosen.height <= 1 + 1e-9
    assert 0 <= chosen.left <= chosen.left + chosen.width <= 1 + 1e-9
    down, across = chosen.height * picture[0] / crop[0], chosen.width * picture[1] / crop[1]
    assert down == pytest.approx(across)
    if fits:
        assert down >= 1 - 1e-9  # never enlarged


def test_the_shorter_side_is_brought_to_resize() -> None:
    chosen = choose_crop((100, 200), (32, 32), resize=50)
    assert (chosen.height, chosen.width) == pytest.approx((0.64, 0.32))
    assert (chosen.top, chosen.left) == pytest.approx((0.18, 0.34))
    covering = choose_crop((100, 200), (50, 50))
    assert (covering.height, covering.width) == pytest.approx((1.0, 0.5))
    assert needed_size(covering, (50, 50)) == (100, 200)


@settings(max_examples=40, deadline=None)
@given(
    picture=sizes, position=st.tuples(shares, shares), flip=st.booleans(), mode=st.sampled_from(["L", "RGB"])
)
def test_a_crop_that_is_not_scaled_holds_pixels_of_the_picture(
    picture: tuple[int, int], position: tuple[float, float], flip: bool, mode: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    size = (min(picture), 24)
    chosen = choose_crop(picture, size, resize=min(picture), position=position, flip=flip)
    top, left = round(chosen.top * picture[0]), round(chosen.left * picture[1])
    expected = np.atleast_3d(np.asarray(image))[top : top + size[0], left : left + 24]
    seen = crop_picture(image, chosen, size)
    assert np.array_equal(seen, (expected[:, ::-1] if flip else expected).transpose(2, 0, 1))
    assert seen.flags.writeable
    filtered = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, left + 24, top + size[0]))
    assert np.array_equal(np.atleast_3d(np.asarray(filtered)), expected)


def test_labels_take_the_value_at_each_centre_and_mirror() -> None:
    labels = np.arange(16).reshape(4, 4)
    assert crop_labels(labels, Crop(0, 0, 1, 1), (4, 4)).tolist() == labels.tolist()
    assert crop_labels(labels, Crop(0, 0, 1, 1, flip=True), (4, 4)).tolist() == labels[:, ::-1].tolist()
    assert (
        crop_labels(labels, Crop(0.5, 0.5, 0.5, 0.5), (4, 4)).tolist()
        == np.kron(labels[2:, 2:], np.ones((2, 2), int)).tolist()
    )
    # Values are kept, never mixed.
    assert set(np.unique(crop_labels(labels * 1000, Crop(0.1, 0.1, 0.7, 0.7), (9, 9)))) <= set(
        (labels * 1000).ravel().tolist()
    )


def test_uniforms_are_a_fixed_function_of_their_counter() -> None:
    # Written down so that no later change moves the augmentation of a run that is resumed.
    assert uniforms(0, 0, "a", 2) == uniforms(0, 0, "a", 2)
    assert uniforms(3, 1, "photo/7", 1)[0] == pytest.approx(EXPECTED_UNIFORM, abs=1e-12)
    draws = np.array(
        [uniforms(seed, epoch, f"p{n}", 2) for seed in (0, 1) for epoch in (0, 1) for n in range(500)]
    )
    assert len(np.unique(draws)) == draws.size
    assert np.abs(draws.mean(axis=0) - 0.5).max() < 0.03
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.07


EXPECTED_UNIFORM = 0.8343104975572239
