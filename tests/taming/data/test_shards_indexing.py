from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from typer.testing import CliRunner

from taming.data.cli import app
from taming.data.config import ShardsDataConfig
from taming.data.dataset import open_dataset
from taming.data.shards.indexing import index_tars
from taming.data.shards.pack import pack_folder
from taming.data.source import data_from, open_split
from taming.errors import DataError, UserError
from tests.taming.data.shard_data import write_everything

Files = list[tuple[str, bytes]]


def picture(value: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.full(size if mode == "L" else (*size, 3), value, dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def write_tar(path: Path, files: Files, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, value: int = 0) -> Files:
    return [(f"{key}.png", picture(value)), (f"{key}.cls", b"%d\n" % value), (f"{key}.txt", b"one\n\n two ")]


def refused(message: str, folder: Path, **options: object) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(DataError, match=message) as error:
        index_tars(folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert sorted(folder.iterdir()) == before


def test_tars_of_webdataset_become_shards(tmp_path: Path) -> None:
    for number in range(2):
        with webdataset.TarWriter(str(tmp_path / f"some {number}.tar")) as tar:
            for n in range(3 * number, 3 * number + 3):
                maps = {"segmentation.png": picture(n, mode="L"), "depth.png": picture(n, (10, 8), "L")}
                told = {"cls": n, "txt": f"line {n}\nanother", "json": {"url": "http://x"}, "note": b"?"}
                tar.write({"__key__": f"a/{n:03d}", "jpg": picture(9 * n, kind="JPEG"), **maps, **told})
    packed = index_tars(tmp_path)
    assert packed.index.fields == ["image", "segmentation", "depth", "label", "text"]
    assert packed.index.num_labels == 6
    assert packed.index.class_names == [str(n) for n in range(6)]
    assert packed.notes == ["not read: members that end in 6 .json, 6 .note"]
    data = open_split(data_from(str(tmp_path), size=16), "all")
    keys = {}
    for n in range(6):
        one = data.sample(n, -1)
        keys[one["key"]] = one["label"]
        assert abs(int(one["image"].float().mean()) - 9 * one["label"]) <= 3
        assert (one["segmentation"] == one["label"]).all()
        assert one["text"] == f"line {one['label']}"
    assert keys == {f"a/{n:03d}": n for n in range(6)}
    refused(r"index\.json is there already; remove it", tmp_path)


def test_a_pack_that_lost_its_index_gets_it_again(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "folder", count=5)
    index = pack_folder(folder, tmp_path / "pack", shard_samples=2).index
    lost = [tmp_path / "pack" / shard.entries for shard in index.shards]
    entries = [path.read_bytes() for path in lost]
    for path in (*lost, tmp_path / "pack/index.json"):
        path.unlink()
    again = index_tars(tmp_path / "pack").index
    assert [path.read_bytes() for path in lost] == entries
    assert again.shards == index.shards
    assert again.fields == index.fields
    assert again.num_labels == index.num_labels


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_of_all_formats_are_read(tmp_path: Path, format: int) -> None:
    # Longer than the 100 bytes of a plain header, but for USTAR, which splits them at a slash.
    key = f"{'ü' * 40}/{'x' * 90}" + ("y" * 60 if format != tarfile.USTAR_FORMAT else "")
    write_tar(tmp_path / "a.tar", sample(key) + sample("b/2.5"[:3]), format)
    index_tars(tmp_path)
    data = open_dataset(ShardsDataConfig(root=str(tmp_path), size=16, validation_fraction=0), "train")
    assert [data.sample(n, 0)["key"] for n in range(2)] == [key, "b/2"]


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good.tar", sample("a") + sample("b")).read_bytes()
    tars = tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tmp_path / "good.tar") as tar:
        second = tar.getmember("b.png").offset
    end = len(good.rstrip(b"\0")) // 512 * 512 + 512

    def damaged(message: str, data: bytes) -> None:
        (tars / "x.tar").write_bytes(data)
        refused(f"x\\.tar .*{message}", tars)

    flipped = bytearray(good)
    flipped[second + 3] ^= 1
    damaged(f"damaged header at byte {second} ", bytes(flipped))
    damaged("cut off: it has", good[: second + 550])
    damaged("cut off: it ends without an end mark", good[:end])
    damaged("cut off: it ends without an end mark", good[: second + 100])
    damaged("cut off in its end mark", good[: end + 512])
    damaged("data follows its end mark", good + b"more")
    damaged("damaged header", b"\x1f\x8b" + bytes(600))
    damaged("cut off", b"")
    damaged("holds no sample", bytes(1024))
    (tars / "x.tar").write_bytes(good)
    assert index_tars(tars).index.count == 2


def test_hostile_tars_are_refused(tmp_path: Path) -> None:
    tars, number = tmp_path / "tars", 0

    def hostile(message: str, files: Files, kind: bytes = tarfile.REGTYPE) -> None:
        nonlocal number
        tars.mkdir(exist_ok=True)
        with tarfile.open(tars / "x.tar", "w") as tar:
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
                tar.addfile(info, io.BytesIO(data))
                tar.fileobj.write(data if not info.isreg() else b"")
        refused(message, tars)
        number += 1

    for key in ("../../x", "/etc/x", "a/../b", "a//b", "././x", "a\\b", "a\nb", "\udcff"):
        hostile("no relative path|can't encode", sample(key))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        hostile("which is no file but a link", [("a.png", b"")], kind)
    hostile("which is no file but a link", [("a.png", bytes(512))], tarfile.GNUTYPE_SPARSE)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        hostile("a name of 1048576 bytes", [("a.png", bytes(2**20))], kind)
    hostile("malformed extended header", [("a.png", b"999 path=x\n".ljust(512, b"x"))], tarfile.XHDTYPE)
    hostile("size in an extended header", [("a.png", b"12 size=999\n".ljust(512, b"\0"))], tarfile.XHDTYPE)
    assert number == 17
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tars"]


def test_samples_that_are_bad_are_refused_or_left_out(tmp_path: Path) -> None:
    bad: dict[str, Files] = {
        "a/picture .*damaged or not a|damaged or not": [("a.png", b"nothing"), *sample("a")[1:]],
        "a has no text, which other samples have": sample("a")[:2],
        "a has two files for image, .png and .jpg": [*sample("a"), ("a.jpg", picture())],
        "classes are numbers": [sample("a")[0], ("a.cls", b"-1"), sample("a")[2]],
        "are empty": [*sample("a")[:2], ("a.txt", b" \n ")],
        "not UTF-8": [*sample("a")[:2], ("a.txt", b"\xff\xff")],
        "more than the 64 B": [sample("a")[0], ("a.cls", b"1" * 65), sample("a")[2]],
    }
    for number, (message, files) in enumerate(bad.items()):
        folder = tmp_path / str(number)
        write_tar(folder / "x.tar", sample("good") + files + sample("z", 1))
        refused(message, folder)
        packed = index_tars(folder, leave_out=True)
        assert packed.index.count == 2
        assert packed.notes[0].startswith("left out 1 ")
        data = open_dataset(ShardsDataConfig(root=str(folder), size=16, validation_fraction=0), "train")
        assert [data.sample(n, 0)["key"] for n in range(2)] == ["good", "z"]
    write_tar(tmp_path / "maps/x.tar", [("a.png", picture()), ("a.depth.png", picture(0, (16, 20), "L"))])
    refused("aspects differ", tmp_path / "maps")
    write_tar(tmp_path / "twice/x.tar", sample("a") + sample("b") + sample("a"))
    refused("hold the key 'a' 2 times", tmp_path / "twice")
    box = json.dumps({"objects": [{"label": 0, "box": [0, 0, 2, 1]}]}).encode()
    write_tar(tmp_path / "boxes/x.tar", [("a.png", picture()), ("a.json", box)])
    assert index_tars(tmp_path / "boxes").index.fields == ["image"]
    (tmp_path / "boxes/index.json").unlink()
    refused(r"box \[0\.0, 0\.0, 2\.0, 1\.0\] is not", tmp_path / "boxes", fields=["image", "objects"])
    refused("'pixels' is none of image", tmp_path / "boxes", fields=["image", "pixels"])


def test_the_commands(tmp_path: Path) -> None:
    folder = write_everything(tmp_path / "folder", count=4)
    out, run = tmp_path / "out", CliRunner()
    options = ["-o", "segmentation=labels", "-o", "num_labels=5", "-o", "data.text=captions"]
    arguments = ["pack", str(folder.root), "--out", str(out), "--size-per-shard", "5K", *options]
    result = run.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "4 samples (image, segmentation, text) in 4 shard(s)" in result.output
    assert f"-o data.kind=shards -o data.root={out}" in result.output
    assert "-o data.segmentation=true -o data.text=true -o data.num_labels=5" in result.output
    (out / "index.json").unlink()
    result = run.invoke(app, ["index", str(out), "--fields", "image, text", "--leave-out"])
    assert result.exit_code == 0, result.output
    assert "not read: members that end in 4 .segmentation.png" in result.output
    mistakes = {
        ("pack", "scenes", "--out", "x"): "data of kind scenes",
        ("pack", str(folder.root), "--out", "x", "--size-per-shard", "0"): "--size-per-shard '0' is no size",
        ("pack", str(tmp_path / "nowhere"), "--out", "x"): "no data at",
        ("index", str(tmp_path)): "no files *.tar in",
        ("index", str(tmp_path / "nowhere")): "no files *.tar in",
    }
    for words, message in mistakes.items():
        result = run.invoke(app, list(words))
        assert isinstance(result.exception, UserError), words
        assert message in str(result.exception)
