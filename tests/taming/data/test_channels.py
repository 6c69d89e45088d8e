"""Pictures of one, three, four and any number of channels, of 8 and 16 bits, with pixels that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data.batch import to_device
from taming.data.channels import read_pixel_size, read_pixels
from taming.data.config import FolderDataConfig
from taming.data.dataset import open_dataset
from taming.data.transforms import choose_crop
from taming.errors import DataError

DEEP = np.linspace(0, 65535, 24 * 20).reshape(24, 20).astype(np.uint16)


def test_grey_keeps_its_16_bits(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "deep.png")
    pixels = read_pixels(tmp_path / "deep.png", 1)
    assert pixels.dtype == np.float32
    assert np.allclose((pixels[0] + 1) * 32767.5, DEEP, atol=0.01)
    assert read_pixels(tmp_path / "deep.png", 3).dtype == np.uint8


def test_colour_as_grey_and_with_alpha(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [10, 20, 30, 128]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(read_pixels(tmp_path / "a.png", 4), rgba.transpose(2, 0, 1))
    assert read_pixels(tmp_path / "a.png", 1)[0, 0, :2].tolist() == [76, 255]  # clear is white
    Image.fromarray(rgba[..., :3]).save(tmp_path / "b.png")
    assert (read_pixels(tmp_path / "b.png", 4)[3] == 255).all()
    with pytest.raises(DataError, match=r"1, 3 or 4 channels, not 5"):
        read_pixels(tmp_path / "b.png", 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_number_of_channels(tmp_path: Path, dtype: type) -> None:
    generator = np.random.default_rng(0)
    array = generator.random((5, 12, 16)).astype(np.float32)
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    np.save(tmp_path / "a.npy", (array * top).astype(dtype))
    assert read_pixel_size(tmp_path / "a.npy", 5) == (12, 16)
    pixels = read_pixels(tmp_path / "a.npy", 5)
    assert pixels.shape == (5, 12, 16)
    unit = {np.uint8: pixels / 255, np.uint16: (pixels + 1) / 2, np.float32: pixels}[dtype]
    assert np.abs(unit - array).max() <= 1 / top + 1e-6 if top > 1 else np.array_equal(unit, array)
    size = (6, 6)
    cut = read_pixels(tmp_path / "a.npy", 5, crop=choose_crop((12, 16), size, flip=True), size=size)
    assert cut.shape == (5, 6, 6)
    assert cut.dtype == pixels.dtype


def test_bicubic_overshoot_stays_in_range(tmp_path: Path) -> None:
    steps = np.tile(np.array([-1, -1, 1, 1], np.float32), (1, 16, 4))
    np.save(tmp_path / "a.npy", steps)
    cut = read_pixels(tmp_path / "a.npy", 1, crop=choose_crop((16, 16), (12, 12)), size=(12, 12))
    assert cut.min() == -1
    assert cut.max() == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((8, 8, 2), np.uint8), r"not \(C, H, W\) with 2 channels"),
        (np.zeros((2, 8, 8), np.float64), "float64; save it as uint8"),
        (np.full((2, 8, 8), 3.0, np.float32), "values from 3.0 to 3.0"),
        (np.full((2, 8, 8), np.nan, np.float32), "values from nan"),
        (np.array([[[object()]]] * 2), "cannot be read"),
    ],
)
def test_arrays_that_cannot_be_pictures(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_pixels(tmp_path / "a.npy", 2)


def test_a_damaged_array_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=r"a\.npy cannot be read"):
        read_pixel_size(tmp_path / "a.npy", 3)


def test_a_folder_of_arrays_and_one_of_mixed_depth(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", np.full((2, 20, 24), 100, np.uint8))
    config = FolderDataConfig(root=tmp_path, size=16, channels=2, validation_fraction=0.0)
    dataset = open_dataset(config, "train")
    assert dataset.sample(0, 0)["image"].shape == (2, 16, 16)
    assert config.gives == {"image": 2}
    # Beside pictures, arrays are other files.
    Image.fromarray(DEEP).save(tmp_path / "d.png")
    Image.new("RGB", (20, 24), "white").save(tmp_path / "e.png")
    dataset = open_dataset(
        FolderDataConfig(root=tmp_path, size=16, channels=1, validation_fraction=0.0), "train"
    )
    batch = to_device(dataset.batch([0, 1], [-1, -1]), "cpu")
    assert batch["key"] == ["d", "e"]
    assert batch["image"].shape == (2, 1, 16, 16)
    assert torch.equal(batch["image"][1], torch.ones(1, 16, 16))
    assert batch["image"][0].unique().numel() > 200


def test_second_pictures_have_their_own_channels(tmp_path: Path) -> None:
    for number in range(2):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.new("RGB", (20, 24), "red").save(tmp_path / folder / f"{number}.png")
    options = {"condition_image": "masks", "condition_channels": 1, "validation_fraction": 0.0}
    config = FolderDataConfig(root=tmp_path, size=16, **options)
    sample = open_dataset(config, "train").sample(0, 0)
    assert sample["image"].shape[0] == 3
    assert sample["condition_image"].shape[0] == 1
    assert config.gives == {"image": 3, "condition_image": 1}
