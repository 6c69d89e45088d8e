"""Files that a user gives become conditions of one size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage2_ar.conditions import Condition, build_condition
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CombinedConditionConfig,
    DepthConditionConfig,
    ImageConditionConfig,
    SegmentationConditionConfig,
)
from stage2_ar.sample_command.given import read_given
from taming.data.edges import canny
from taming.errors import DataError, UserError

FACTOR = 8
SEGMENTATION = SegmentationConditionConfig(num_labels=9)
LOW = ImageConditionConfig(source="low_resolution", scale=4)


def built(config: Any) -> Condition:
    return build_condition(config, width=8, downsample_factor=FACTOR)


def write(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values).save(path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return write(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (43, 34, 3), np.uint8))


def test_own_pixels_are_cropped_to_whole_cells_and_not_resampled(tmp_path: Path, photo: Path) -> None:
    labels = np.random.default_rng(1).integers(0, 9, (43, 34), np.uint8)
    path = write(tmp_path / "map.png", labels)
    values, size = read_given(built(SEGMENTATION), {"segmentation": [path, path]}, None, FACTOR)
    assert size == (40, 32)
    assert values["segmentation"].dtype == torch.int64
    assert np.array_equal(values["segmentation"][1], labels[1:41, 1:33])

    values, size = read_given(built(ImageConditionConfig()), {"image": [photo]}, None, FACTOR)
    whole = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1).float() / 127.5 - 1
    assert size == (40, 32)
    assert torch.allclose(values["image"][0], whole[:, 1:41, 1:33], atol=1e-6)

    deep = np.random.default_rng(1).integers(0, 65536, (16, 24)).astype(np.uint16)
    path = write(tmp_path / "depth.png", deep)
    values, size = read_given(built(DepthConditionConfig()), {"depth": [path]}, None, FACTOR)
    assert size == (16, 24)
    assert np.allclose(values["depth"][0, 0], deep / 65535, atol=1e-6)


def test_a_size_is_covered_and_labels_are_never_mixed(tmp_path: Path) -> None:
    labels = np.zeros((30, 60), np.uint8)
    labels[:, 30:] = 8
    path = write(tmp_path / "map.png", labels)
    for size in ((16, 16), (64, 64), (16, 48)):
        values, found = read_given(built(SEGMENTATION), {"segmentation": [path]}, size, FACTOR)
        assert found == size
        assert values["segmentation"].shape == (1, *size)
        assert values["segmentation"].unique().tolist() == [0, 8]
        halves = values["segmentation"][0].chunk(2, dim=1)
        assert (halves[0] == 0).all()
        assert (halves[1] == 8).all()


def test_a_low_resolution_decides_the_size(tmp_path: Path, photo: Path) -> None:
    condition = built(LOW)
    small = write(tmp_path / "small.png", np.full((11, 6, 3), 255, np.uint8))
    values, size = read_given(condition, {"image": [small]}, None, FACTOR)
    assert size == (40, 24)
    assert values["image"].shape == (1, 3, 10, 6)
    assert torch.equal(values["image"], torch.ones(1, 3, 10, 6))
    # Whatever is asked for: a larger picture is made small.
    values, size = read_given(condition, {"image": [photo]}, (64, 32), FACTOR)
    assert size == (64, 32)
    assert values["image"].shape == (1, 3, 16, 8)
    with pytest.raises(UserError, match=r"54x32 pixels made 4 times smaller; give .* a multiple of 8"):
        read_given(condition, {"image": [photo]}, (54, 32), FACTOR)


def test_edges_of_a_picture_or_an_edge_map(tmp_path: Path, photo: Path) -> None:
    condition = built(ImageConditionConfig(source="edges"))
    values, _ = read_given(condition, {"image": [photo]}, (40, 32), FACTOR)
    plain, _ = read_given(built(ImageConditionConfig()), {"image": [photo]}, (40, 32), FACTOR)
    assert torch.equal(values["image"], (canny(plain["image"]) + 1) / 2)
    lines = np.zeros((40, 32), np.uint8)
    lines[10, 5:20] = 255
    for name, drawn in (("grey.png", lines), ("rgb.png", np.stack([lines] * 3, axis=-1))):
        values, _ = read_given(condition, {"image": [write(tmp_path / name, drawn)]}, None, FACTOR)
        assert np.array_equal(values["image"][0, 0], lines / 255)
    # A thin line outlives being scaled.
    values, _ = read_given(condition, {"image": [tmp_path / "grey.png"]}, (16, 16), FACTOR)
    assert set(values["image"].unique().tolist()) == {0, 1}
    assert values["image"][0, 0].any(0).sum() >= 6


def test_several_kinds_at_once(tmp_path: Path) -> None:
    config = CombinedConditionConfig(
        conditions=[ClassConditionConfig(num_classes=3), SEGMENTATION, ImageConditionConfig(channels=1)]
    )
    path = write(tmp_path / "a.png", np.zeros((24, 24), np.uint8))
    given = {"segmentation": [path], "image": [path]}
    values, size = read_given(built(config), given, None, FACTOR)
    assert size == (24, 24)
    assert values["segmentation"].shape == (1, 24, 24)
    assert values["image"].shape == (1, 1, 24, 24)
    # The picture of 24 pixels and its quarter agree.
    config = CombinedConditionConfig(conditions=[SEGMENTATION, LOW])
    small = write(tmp_path / "small.png", np.zeros((6, 6), np.uint8))
    assert read_given(built(config), {"segmentation": [path], "image": [small]}, None, FACTOR)[1] == (24, 24)
    with pytest.raises(UserError, match=r"differ in size \(a.png for 24x24, a.png for 96x96\); give --size"):
        read_given(built(config), given, None, FACTOR)


def test_mistakes_are_named(tmp_path: Path, photo: Path) -> None:
    condition = built(SEGMENTATION)
    with pytest.raises(UserError, match="no condition 'depth'; it takes 'segmentation'"):
        read_given(condition, {"depth": [tmp_path / "nowhere.png"]}, None, FACTOR)
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        read_given(condition, {"segmentation": [tmp_path / "nowhere.png"]}, None, FACTOR)
    with pytest.raises(DataError, match="is a picture in mode RGB, not a label map"):
        read_given(condition, {"segmentation": [photo]}, None, FACTOR)
    tiny = write(tmp_path / "tiny.png", np.zeros((7, 20), np.uint8))
    with pytest.raises(UserError, match=r"tiny\.png is 7x20 pixels, smaller than one cell of 8x8"):
        read_given(condition, {"segmentation": [tiny]}, None, FACTOR)
    assert read_given(condition, {}, (16, 16), FACTOR) == ({}, (16, 16))
    assert read_given(condition, {}, None, FACTOR) == ({}, None)
