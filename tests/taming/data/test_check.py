"""`taming data check` on folders, codes and the command line: all that is wrong, in one pass, told safely."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from taming.config import build_config
from taming.data.checking.check import check_data, check_source
from taming.data.checking.findings import Finding
from taming.data.cli import app
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.errors import DataError, UserError
from taming.options import printable


def save(path: Path, height: int = 8, width: int = 8, *, labels: int | None = None, seed: int = 0) -> None:
    """A picture of noise, or a map of `labels` labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng([seed, *path.name.encode()])
    shape = (height, width) if labels else (height, width, 3)
    Image.fromarray(random.integers(0, labels or 256, shape, dtype=np.uint8)).save(path)


def found_in(root: Path, **values: Any) -> Counter[tuple[str, str]]:
    config = build_config(FolderDataConfig, {"root": root, "size": 8, **values})
    return Counter((finding.reason, Path(finding.path).name) for finding in check_data(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(6):
        save(tmp_path / "images" / "ab"[number % 2] / f"{number}.png")
        save(tmp_path / "maps" / "ab"[number % 2] / f"{number}.png", labels=5, seed=1)
        save(tmp_path / "second" / "ab"[number % 2] / f"{number}.jpg", seed=2)
        (tmp_path / "texts" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / "ab"[number % 2] / f"{number}.txt").write_text("words")
    return tmp_path


ALL = {
    "segmentation": "maps",
    "num_labels": 5,
    "condition_image": "second",
    "text": "texts",
    "class_labels": True,
}


def test_a_folder_in_order(folder: Path) -> None:
    assert not found_in(folder, **ALL)


def test_everything_wrong_is_found_in_one_pass(folder: Path) -> None:
    images, maps = folder / "images", folder / "maps"
    save(images / "loose.png")  # no class, no maps, no text
    save(images / "a" / "small.png", 7, 9)
    save(maps / "a" / "small.png", 7, 9, labels=5)
    save(images / "a" / "0.jpg")  # the name of 0.png
    save(maps / "a" / "2.gif", labels=5)
    save(maps / "a" / "alone.png", labels=5)
    save(maps / "b" / "1.png", 8, 16, labels=5)
    save(maps / "b" / "3.png", labels=9)
    save(maps / "a" / "4.png")  # in colour
    (images / "b" / "5.png").write_bytes(b"")
    (folder / "texts" / "b" / "1.txt").write_text(" \n")
    shutil.copy(images / "b" / "1.png", images / "b" / "copy.png")
    shutil.copy(maps / "a" / "0.png", maps / "b" / "copy.png")
    for name in ("a/small", "b/copy"):
        save(folder / "second" / f"{name}.png", 7 if "small" in name else 8, 9 if "small" in name else 8)
        (folder / "texts" / f"{name}.txt").write_text("words")
    assert found_in(folder, **ALL) == Counter(
        {
            ("duplicate", "0.png"): 1,
            ("duplicate", "2.png"): 1,
            ("duplicate", "1.png"): 1,
            ("mismatched", "loose.png"): 2,  # no class, no text
            ("missing", "loose.png"): 2,
            ("too small", "small.png"): 1,
            ("mismatched", "alone.png"): 1,
            ("mismatched", "1.png"): 2,  # the map's aspect, the picture's text
            ("mismatched", "3.png"): 1,
            ("mismatched", "4.png"): 1,
            ("truncated", "5.png"): 1,
        }
    )
    assert found_in(folder, **ALL, upscale=True)["too small", "small.png"] == 0


def test_boxes_and_captions_of_one_file(folder: Path) -> None:
    (folder / "boxes.json").write_text("[" * 100_000)
    assert found_in(folder, objects="boxes.json", text="boxes.json") == Counter(
        {("mismatched", "boxes.json"): 2}
    )


def test_groups_of_equal_files_are_told_whole(tmp_path: Path) -> None:
    for name in "abcd":
        save(tmp_path / f"{name}.png")
    for name in "xyz":
        shutil.copy(tmp_path / "c.png", tmp_path / f"{name}.png")
    os.link(tmp_path / "a.png", tmp_path / "linked.png")
    found = list(check_data(build_config(FolderDataConfig, {"root": tmp_path, "size": 1}), workers=3))
    groups = {tuple(Path(path).stem for path in (f.path, *f.others)) for f in found}
    assert groups == {("a", "linked"), ("c", "x", "y", "z")}


def test_what_cannot_be_checked_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to check"):
        check_data(ScenesDataConfig())
    with pytest.raises(DataError, match="no pictures"):
        list(check_source(str(tmp_path)))
    with pytest.raises(UserError, match="no data at"):
        check_source(str(tmp_path / "nowhere"))


def codes_folder(root: Path) -> Path:
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for split in splits:
        codes = torch.arange(2 * 4, dtype=torch.int32).reshape(2, 1, 2, 2)
        save_file({"codes": codes, "label": torch.zeros(2)}, root / f"{split}-00000.safetensors")
        entry = {"file": f"{split}-00000.safetensors", "keys": ["a", "b"], "text": [["x"], ["y"]]}
        splits[split].append(entry)
    index = {"format": "taming-codes/1", "codebook_size": 8, "splits": splits}
    (root / "index.json").write_text(json.dumps(index))
    return root


def test_codes(tmp_path: Path) -> None:
    root = codes_folder(tmp_path)
    index, first = json.loads((root / "index.json").read_text()), root / "train-00000.safetensors"

    def reasons(**changes: Any) -> list[str]:
        document = json.loads(json.dumps(index))
        document["splits"]["train"][0].update(changes)
        (root / "index.json").write_text(json.dumps(document))
        return [finding.reason for finding in check_source(str(root))]

    assert reasons() == []
    assert reasons(keys=["a", "a"]) == ["duplicate"]
    assert reasons(keys=["a"]) == ["mismatched"]
    assert reasons(text=[["x"]]) == ["mismatched"]
    assert reasons(file="../train-00000.safetensors") == ["mismatched"]
    assert reasons(file="train-00007.safetensors") == ["missing"]
    whole = first.read_bytes()
    first.write_bytes(whole[:-3])
    assert reasons() == reasons(size=len(whole)) == ["truncated"]
    first.write_bytes(whole)
    assert reasons(size=len(whole), sha256=hashlib.sha256(whole).hexdigest()) == []
    assert reasons(size=len(whole), sha256=hashlib.sha256(b"").hexdigest()) == ["checksum"]
    first.write_bytes(b"\x80\x04cos\nsystem\n." * 9)
    assert reasons() == ["unreadable"]
    save_file({"codes": torch.full((2, 1, 2, 2), 8, dtype=torch.int32)}, first)
    assert reasons() == ["mismatched"]
    assert [f.reason for f in check_source(str(root), decode=False)] == []
    save_file({"other": load_file(first)["codes"]}, first)
    assert reasons() == ["mismatched"]
    (root / "config.yaml").write_text(f"data: {{kind: codes, root: {root}}}")
    assert [f.reason for f in check_source(str(root / "config.yaml"))] == ["mismatched"]
    (root / "index.json").write_text('{"format": "taming-codes/1", "splits": ' + "[" * 100_000)
    with pytest.raises(DataError, match="encode again"):
        list(check_source(str(root)))


def test_the_command(tmp_path: Path) -> None:
    save(tmp_path / "data" / "right.png")
    arguments = ["check", str(tmp_path / "data"), "--report", str(tmp_path / "out" / "report.json")]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.output) == (0, "1 checked: nothing wrong\n")
    hostile = "[red]\x1b]0;owned\x07\n\u202egnp"
    (tmp_path / "data" / f"{hostile}.png").write_bytes(b"no picture")
    (tmp_path / "data" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"")
    done = CliRunner().invoke(app, [*arguments, "--workers", "2"])
    assert done.exit_code == 1
    assert len(done.output.splitlines()) == 3
    assert r"[red]\x1b]0;owned\x07\n\u202egnp.png" in done.output
    assert r"\udcff\udcfe.png" in done.output
    assert done.output.endswith("3 checked: 1 unreadable, 1 truncated\n")
    assert not any(ord(character) < 32 and character != "\n" for character in done.output)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["counts"] == {"unreadable": 1, "truncated": 1}
    assert {Path(item["path"]).name for item in report["findings"]} == {
        f"{hostile}.png",
        os.fsdecode(b"\xff\xfe.png"),
    }
    headers = CliRunner().invoke(app, [*arguments, "--headers", "-o", "data.size=9"])
    assert "1 too small" in headers.output
    assert isinstance(CliRunner().invoke(app, ["check", str(tmp_path / "x")]).exception, UserError)
    assert CliRunner().invoke(app, ["check"]).exit_code == 2


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    assert printable("Größe 画像 [b] \\ '") == "Größe 画像 [b] \\ '"
    assert printable("a\x1b[2J\r\n\t\x9b\u2066\udcff") == r"a\x1b[2J\r\n\t\x9b\u2066\udcff"


def test_findings_come_in_the_order_of_names_however_many_threads(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02d}.png").write_bytes(b"x" * number)
    config = build_config(FolderDataConfig, {"root": tmp_path, "size": 1})
    one, many = (list(check_data(config, workers=workers)) for workers in (1, 7))
    assert one == many
    assert [Path(finding.path).stem for finding in one] == [f"{number:02d}" for number in range(30)]
    assert isinstance(one[0], Finding)
    seen: list[tuple[int, int]] = []
    list(check_data(config, progress=lambda done, total: seen.append((done, total))))
    assert seen == [(number, 30) for number in range(1, 31)]
