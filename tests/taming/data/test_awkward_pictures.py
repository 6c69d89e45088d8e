"""Awkward pictures through our reader and through the check."""

from __future__ import annotations

import os
import shutil
import struct
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from taming.config import build_config
from taming.data.channels import read_pixels
from taming.data.checking.check import check_data
from taming.data.config import FolderDataConfig
from taming.data.picture import FileBytes, read_depth, read_labels, read_picture, read_size
from taming.errors import BadSample
from tests.taming.data.awkward_pictures import (
    GOOD,
    INDICES,
    RGB,
    Bad,
    Good,
    bad_pictures,
    unharmed_but_damaged,
)
from tests.taming.data.picture_files import (
    GREY,
    PALETTE,
    png,
    tiff,
)


@pytest.mark.parametrize("case", GOOD, ids=lambda case: ascii(case.name))
@pytest.mark.filterwarnings("error")
def test_what_is_right_gives_its_pixels(case: Good, tmp_path: Path) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.data)
    pixels = np.asarray(read_picture(path))
    assert pixels.shape == case.pixels.shape
    assert np.abs(pixels.astype(int) - case.pixels).max() <= case.tolerance
    assert read_size(path) == case.pixels.shape[:2]


@pytest.mark.parametrize("case", bad_pictures(), ids=lambda case: case.name)
def test_what_is_wrong_is_refused_with_its_reason(case: Bad, tmp_path: Path) -> None:
    path = tmp_path / case.name
    path.write_bytes(case.data)
    with pytest.raises(BadSample) as caught:
        read_picture(path)
    assert caught.value.reason == case.reason, caught.value
    assert str(path) in str(caught.value)


def test_a_check_finds_all_that_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    wanted = Counter[tuple[str, str]]()
    cases: list[Good | Bad] = [*GOOD, *bad_pictures(), *unharmed_but_damaged()]
    for case in cases:
        # Some good files differ in their suffix alone, and some names only in case.
        path = tmp_path / case.name / case.name
        path.parent.mkdir(parents=True)
        path.write_bytes(case.data)
        if isinstance(case, Bad):
            wanted[case.name, case.reason] += 1
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    wanted["link.png", "missing"] += 1
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    wanted["round.png", "unreadable"] += 1
    os.mkfifo(tmp_path / "pipe.png")
    wanted["pipe.png", "unreadable"] += 1
    (tmp_path / "device.png").symlink_to("/dev/zero")
    wanted["device.png", "unreadable"] += 1
    shutil.copy(tmp_path / "rows.tif" / "rows.tif", tmp_path / "same.tif")
    config = build_config(FolderDataConfig, {"root": tmp_path, "size": 1})
    found = list(check_data(config, workers=4))
    assert Counter((Path(f.path).name, f.reason) for f in found if f.reason != "duplicate") == wanted
    groups = [{Path(path).name for path in (f.path, *f.others)} for f in found if f.reason == "duplicate"]
    assert groups == [{"rows.tif", "same.tif"}]
    headers = {(Path(f.path).name, f.reason) for f in check_data(config, decode=False)}
    assert ("large.png", "too large") in headers
    assert ("page.jpg", "unreadable") in headers
    assert ("flipped.png", "checksum") not in headers


def test_arrays_that_are_none(tmp_path: Path) -> None:
    whole = BytesIO()
    np.save(whole, RGB.transpose(2, 0, 1))
    objects = BytesIO()
    np.save(objects, np.array([[["x"]]] * 3, dtype=object), allow_pickle=True)
    several = BytesIO()
    np.savez(several, RGB)
    deep = b"-" * 9000 + b"1\n"
    cases = {
        "cut": (whole.getvalue()[:-9], "truncated"),
        "cut header": (whole.getvalue()[:50], "truncated"),
        "empty": (b"", "truncated"),
        "objects": (objects.getvalue(), "unreadable"),
        "pickle": (b"\x80\x04cos\nsystem\n.", "unreadable"),
        "deep": (b"\x93NUMPY\x01\x00" + struct.pack("<H", len(deep)) + deep, "unreadable"),
        "rows": (whole.getvalue().replace(b"(3, 5, 7)", b"(5, 3, 7)"), "mismatched"),
        "several": (several.getvalue(), "unreadable"),
        "huge": (whole.getvalue().replace(b"(3, 5, 7), ", b"(3,9**9,9)"), "unreadable"),
    }
    for name, (data, _) in cases.items():
        (tmp_path / f"{name}.npy").write_bytes(data)
    (tmp_path / "right.npy").write_bytes(whole.getvalue())
    os.mkfifo(tmp_path / "pipe.npy")
    config = build_config(FolderDataConfig, {"root": tmp_path, "size": 1})
    found = {Path(f.path).stem: f.reason for f in check_data(config)}
    assert found == {"pipe": "unreadable"} | {name: reason for name, (_, reason) in cases.items()}
    for name, (data, reason) in cases.items():
        with pytest.raises(BadSample) as caught:
            read_pixels(FileBytes(f"{name}.npy", data), 3)
        assert caught.value.reason == reason, name


def test_what_comes_from_a_shard_is_refused_in_the_same_words(tmp_path: Path) -> None:
    for case in bad_pictures():
        with pytest.raises(BadSample) as caught:
            read_picture(FileBytes(case.name, case.data))
        assert caught.value.reason == case.reason


def test_labels_are_the_values_in_the_file_however_many_bits_they_have(tmp_path: Path) -> None:
    maps = {f"{bits}.png": png(INDICES % 2**bits, GREY, bits=bits) for bits in (1, 2, 4, 8, 16)} | {
        "interlaced.png": png(INDICES, GREY, bits=2, interlaced=True),
        "palette.png": png(INDICES, PALETTE, bits=2, before=[(b"PLTE", bytes(12))]),
        "rows.tif": tiff(
            [(INDICES[row] * 16).astype(np.uint8).tobytes()[:1] for row in range(5)],
            1,
            5,
            bits=[4],
            photometric=1,
        ),
    }
    for name, data in maps.items():
        (tmp_path / name).write_bytes(data)
        wanted = INDICES[:, :1] if name == "rows.tif" else INDICES % 2 if name == "1.png" else INDICES
        assert np.array_equal(read_labels(tmp_path / name), wanted), name


def test_depth_of_any_bits_is_its_share_of_white(tmp_path: Path) -> None:
    (tmp_path / "12.tif").write_bytes(tiff([b"\xff\xf8\x00"], 2, 1, bits=[12], photometric=1))
    (tmp_path / "2.png").write_bytes(png(INDICES, GREY, bits=2))
    assert np.allclose(read_depth(tmp_path / "12.tif"), [[1, 0x800 / 0xFFF]], atol=1e-5)
    assert np.allclose(read_depth(tmp_path / "2.png"), INDICES / 3)
