"""Awkward pictures, each made here with pixels that are known."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.picture import (
    read_depth,
    read_labels,
    read_picture,
    read_size,
    save_png,
    tile,
    to_uint8,
)
from taming.errors import DataError

RGB = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], np.uint8
)  # (2, 3, 3)


def pixels(path: Path) -> np.ndarray:
    image = read_picture(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_rgb_in_every_lossless_format(tmp_path: Path) -> None:
    for suffix in ("png", "bmp", "tif", "ppm", "webp"):
        path = tmp_path / f"picture.{suffix}"
        Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(pixels(path), RGB), suffix


def test_a_files_content_decides_not_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    Image.fromarray(RGB).save(path, format="PNG")
    assert np.array_equal(pixels(path), RGB)


def test_grey_and_one_bit(tmp_path: Path) -> None:
    grey = np.array([[0, 7], [128, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    assert np.array_equal(pixels(tmp_path / "bits.png")[..., 0], [[0, 0], [255, 255]])


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    deep = np.array([[0, 257], [25700, 65535]], np.uint16)
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(deep).save(path)
    assert np.array_equal(pixels(path)[..., 0], [[0, 1], [100, 255]])
    assert np.allclose(read_depth(path), deep / 65535)


def test_32_bit_integers_are_scaled_as_16_bit_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], np.int32)).save(tmp_path / "within.tif")
    assert pixels(tmp_path / "within.tif")[0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "beyond.tif")
    with pytest.raises(DataError, match=r"beyond\.tif.*70000.*8 or 16 bits"):
        read_picture(tmp_path / "beyond.tif")


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 1.0]], np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="mode F"):
        read_picture(tmp_path / "float.tif")


def palette_picture() -> Image.Image:
    indexed = Image.new("P", (2, 2))
    indexed.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for place, index in {(1, 0): 1, (0, 1): 2, (1, 1): 1}.items():
        indexed.putpixel(place, index)
    return indexed


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette_picture().save(tmp_path / "palette.png")
    assert pixels(tmp_path / "palette.png").tolist() == [
        [[255, 0, 0], [0, 255, 0]],
        [[0, 0, 255], [0, 255, 0]],
    ]
    palette_picture().save(tmp_path / "clear.png", transparency=1)
    assert pixels(tmp_path / "clear.png").tolist() == [
        [[255, 0, 0], [255, 255, 255]],
        [[0, 0, 255], [255, 255, 255]],
    ]


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[100, 0, 0, 0], [100, 0, 200, 255], [0, 0, 0, 51]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png").tolist() == [[[255, 255, 255], [100, 0, 200], [204, 204, 204]]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 102)])
    grey.save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png").tolist() == [[[153, 153, 153]]]


def test_a_transparent_colour_of_an_rgb_png(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "key.png", transparency=(10, 20, 30))
    expected = RGB.copy()
    expected[1, 0] = 255
    assert np.array_equal(pixels(tmp_path / "key.png"), expected)


def test_cmyk(tmp_path: Path) -> None:
    for suffix in ("tif", "jpg"):
        path = tmp_path / f"cmyk.{suffix}"
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path)
        assert np.abs(pixels(path).astype(int) - [255, 0, 0]).max() <= 3, suffix


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    # What each orientation asks of the stored rows and columns (Exif 2.3, tag 0x0112).
    shown = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: RGB[::-1].transpose(1, 0, 2),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: RGB.transpose(1, 0, 2)[::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(RGB).save(path, exif=exif)
    assert np.array_equal(pixels(path), shown)
    assert read_size(path) == shown.shape[:2]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "webp"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert (pixels(path) == [255, 0, 0]).all(), suffix


def test_a_large_jpeg_is_decoded_small_but_not_below_what_is_needed(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 800, dtype=np.uint8)[None, :, None], (400, 1, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "large.jpg", quality=95, exif=exif)
    assert read_size(tmp_path / "large.jpg") == (800, 400)
    small = read_picture(tmp_path / "large.jpg", at_least=(190, 90))
    assert small.size == (100, 200)
    whole = read_picture(tmp_path / "large.jpg").resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole)).max() <= 4
    assert read_picture(tmp_path / "large.jpg", at_least=(801, 90)).size == (400, 800)


def test_label_maps_give_indices(tmp_path: Path) -> None:
    palette_picture().save(tmp_path / "palette.png")
    assert read_labels(tmp_path / "palette.png").tolist() == [[0, 1], [2, 1]]
    assert read_labels(tmp_path / "palette.png").dtype == np.int64
    Image.fromarray(np.array([[0, 299]], np.uint16)).save(tmp_path / "deep.png")
    assert read_labels(tmp_path / "deep.png").tolist() == [[0, 299]]
    Image.fromarray(RGB).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match=r"colour\.png.*mode RGB"):
        read_labels(tmp_path / "colour.png")


def test_depth_maps(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "shallow.png")
    assert np.allclose(read_depth(tmp_path / "shallow.png"), [[0, 0.2, 1]])
    Image.fromarray(RGB).save(tmp_path / "colour.png")
    with pytest.raises(DataError, match="8 or 16-bit grey"):
        read_depth(tmp_path / "colour.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm"])
@pytest.mark.parametrize("kept", [0, 1, 40, 0.5, 0.9])
def test_truncated_files_raise_data_errors(tmp_path: Path, suffix: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    with pytest.raises(DataError, match=rf"cut\.{suffix}"):
        read_picture(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on the tags of damaged files
def test_damage_anywhere_is_a_data_error_or_a_picture(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "tif", "gif", "bmp", "ppm"):
        path = tmp_path / f"broken.{suffix}"
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            for place in random.integers(0, min(len(data), 200), 4):
                data[place] = random.integers(0, 256)
            path.write_bytes(data)
            # Any other exception fails the test.
            with suppress(DataError):
                assert read_picture(path, max_pixels=10**6).mode == "RGB"


def test_other_formats_are_never_tried(tmp_path: Path) -> None:
    path = tmp_path / "program.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a JPEG"):
        read_picture(path)
    with pytest.raises(DataError, match="does not exist"):
        read_picture(tmp_path / "nowhere.png")


def test_the_limit_on_pixels_is_ours_and_pillows_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"40x30 pixels, more than data.max_pixels = 1199"):
        read_picture(tmp_path / "large.png", max_pixels=1199)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow alone would refuse it
    assert read_picture(tmp_path / "large.png", max_pixels=1200).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_pixel_values_survive_a_round_trip(tmp_path: Path) -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, 16, 16)
    image = values.float() / 127.5 - 1
    assert torch.equal(to_uint8(image), values)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    save_png(image, tmp_path / "deeper" / "picture.png")
    assert np.array_equal(pixels(tmp_path / "deeper" / "picture.png")[..., 0], values[0].numpy())
    save_png(image[:1], tmp_path / "grey.png")
    assert np.array_equal(pixels(tmp_path / "grey.png")[..., 0], values[0].numpy())


def test_tile_lays_pictures_out_in_rows() -> None:
    images = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 0.5)])
    sheet = tile(images, columns=2, pad=1)
    assert sheet.shape == (3, 2 * 5 + 1, 2 * 7 + 1)
    assert (sheet[:, 1:5, 1:7] == -1).all()
    assert (sheet[:, 1:5, 8:14] == 0).all()
    assert (sheet[:, 6:10, 1:7] == 0.5).all()
    assert (sheet[:, 6:10, 8:14] == 1).all()
    assert (sheet[:, 0] == 1).all()


def test_a_process_that_is_forked_while_a_thread_reads_can_read(tmp_path: Path) -> None:
    path, over = tmp_path / "a.png", threading.Event()
    Image.new("RGB", (8, 8)).save(path)

    def read_on() -> None:
        while not over.is_set():
            read_size(path)

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        for _ in range(12):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(read_size(path) != (8, 8))
                finally:
                    os._exit(2)
            end = time.monotonic() + 10
            while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
                time.sleep(0.001)
            if not ended[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended == (child, 0)
    finally:
        over.set()
        thread.join()
