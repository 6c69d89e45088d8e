"""Depth, second pictures, low resolution, edges and combinations from nothing but files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from taming.config import build_config
from tests.conftest import TINY_MODEL, ar_values
from tests.end_to_end.test_command_line import refused, succeeds, write_config

LABELS = 5
SMALL = {"hidden_width": 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained tokenizer, f2, 16 codes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vq")
    VQModel(build_config(VQModelConfig, TINY_MODEL)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures in two classes, with label maps, depth and second pictures beside them."""
    root, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for number in range(10):
        labels = np.zeros((20, 24), np.uint8)
        labels[int(generator.integers(4, 16)) :] = generator.integers(1, LABELS)
        name = f"{'ab'[number % 2]}/{number}.png"
        pictures = {
            "images": Image.fromarray(labels * 60).convert("RGB"),
            "labels": Image.fromarray(labels),
            "depth": Image.fromarray(labels.astype(np.uint16) * 13107),
            "sketches": Image.fromarray(255 - labels * 50),
        }
        for folder, picture in pictures.items():
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            picture.save(root / folder / name)
    return root


def trained(
    tmp_path: Path, tokenizer: Path, pairs: Path, condition: dict[str, Any], **data: Any
) -> tuple[Path, str]:
    """The run of a tiny transformer on 16x16 pixels, and what the command said."""
    asked = ar_values(
        tokenizer=str(tokenizer),
        condition=condition,
        data={"kind": "folder", "root": str(pairs), "size": 16, **data},
    )
    config, run = write_config(tmp_path / "ar.yaml", asked), tmp_path / "run"
    return run, succeeds("ar", "train", config, "-o", f"training.output={run}")


def facts(out: Path, number: int = 0) -> dict[str, Any]:
    with Image.open(out / f"{number:04d}.png") as picture:
        assert picture.mode == "RGB"
        size = picture.size
    found: dict[str, Any] = json.loads((out / f"{number:04d}.json").read_text())
    assert size == (found["width"], found["height"])
    return found


def test_depth(tokenizer: Path, pairs: Path, tmp_path: Path) -> None:
    run, _ = trained(tmp_path, tokenizer, pairs, {"kind": "depth", **SMALL}, depth="depth")
    assert list((run / "previews").glob("*.png"))
    maps = [pairs / "depth/a/0.png", pairs / "depth/b/1.png"]
    out = tmp_path / "out"
    asked = ("--depth", maps[0], "--depth", maps[1], "--num", 2)
    succeeds("ar", "sample", run, *asked, "--guidance", 2, "--bf16", "--out", out)
    assert [facts(out, number)["conditions"]["depth"] for number in range(4)] == [
        str(maps[0]),
        str(maps[0]),
        str(maps[1]),
        str(maps[1]),
    ]
    assert (facts(out)["height"], facts(out)["width"]) == (20, 24)  # the maps', by the sliding window
    sample = ("ar", "sample", run, "--out", tmp_path / "no", "--num", 1)
    assert "mode RGB, not a depth map" in refused(*sample, "--depth", pairs / "images/a/0.png")
    assert "no condition 'image'; it takes 'depth'" in refused(*sample, "--image", maps[0])
    assert "height 17 is not a multiple" in refused(*sample, "--depth", maps[0], "--size", "17x16")
    assert "'depth' is missing" in refused(*sample)
    assert not (tmp_path / "no").exists()


def test_a_second_picture(tokenizer: Path, pairs: Path, tmp_path: Path) -> None:
    condition = {"kind": "image", "channels": 1, "placement": "prefix", **SMALL}
    options = {"condition_image": "sketches", "condition_channels": 1}
    run, _ = trained(tmp_path, tokenizer, pairs, condition, **options)
    out, sketch = tmp_path / "out", pairs / "sketches/a/0.png"
    succeeds("ar", "sample", run, "--image", sketch, "--size", "16", "--num", 1, "--out", out)
    assert facts(out)["conditions"] == {"image": str(sketch)}
    wrong = ("ar", "train", tmp_path / "ar.yaml", "-o", f"training.output={tmp_path / 'other'}")
    assert "has 1 channels, but the image" in refused(*wrong, "-o", "condition.channels=3")
    assert "set data.condition_image to the folder" in refused(*wrong, "-o", "data.condition_image=null")
    assert not (tmp_path / "other").exists()


def test_low_resolution_and_edges_from_stored_codes(tokenizer: Path, pairs: Path, tmp_path: Path) -> None:
    encode = ("vq", "encode", tokenizer, pairs / "images", "--size", 16, "--out")
    succeeds(*encode, tmp_path / "kept", "--keep", "image", "--views", 2)
    succeeds(*encode, tmp_path / "bare")
    low = {"kind": "image", "source": "low_resolution", "scale": 4, **SMALL}
    asked = ar_values(condition=low, data={"kind": "codes", "root": str(tmp_path / "kept")})
    config = write_config(tmp_path / "ar.yaml", asked)
    train = ("ar", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    told = refused(*train, "-o", f"data.root={tmp_path / 'bare'}")
    assert "taming vq encode --keep image" in told
    assert "data.kind=folder" in told
    assert "cannot be made 3 times smaller" in refused(*train, "-o", "condition.scale=3")
    succeeds(*train)
    Image.new("RGB", (6, 5), (200, 10, 10)).save(tmp_path / "small.png")
    sample = ("ar", "sample", tmp_path / "run", "--image", tmp_path / "small.png", "--num", 1)
    succeeds(*sample, "--out", tmp_path / "out")
    assert (facts(tmp_path / "out")["height"], facts(tmp_path / "out")["width"]) == (20, 24)
    assert "18x18 pixels made 4 times smaller" in refused(*sample, "--size", 18, "--out", tmp_path / "no")

    edges = ("-o", "condition={kind: image, source: edges, hidden_width: 8}")
    run = tmp_path / "edges"
    succeeds("ar", "train", config, *edges, "-o", f"training.output={run}")
    photo = pairs / "images/a/0.png"
    succeeds("ar", "sample", run, "--image", photo, "--size", 16, "--num", 1, "--out", tmp_path / "drawn")
    told = refused(*encode, tmp_path / "no", "--keep", "condition_image")
    assert "condition_image shall be kept, but the data gives crop, image, key" in told


def test_class_and_map_together(tokenizer: Path, pairs: Path, tmp_path: Path) -> None:
    parts = [
        {"kind": "class", "num_classes": 2},
        {"kind": "segmentation", "num_labels": LABELS, "label_dim": 4, **SMALL},
    ]
    run, _ = trained(
        tmp_path,
        tokenizer,
        pairs,
        {"kind": "combined", "conditions": parts},
        class_labels=True,
        segmentation="labels",
        num_labels=LABELS,
    )
    label_map = pairs / "labels/a/0.png"
    sample = ("ar", "sample", run, "--segmentation", label_map, "--size", 16, "--num", 1, "--out")
    succeeds(*sample, tmp_path / "out", "--class", 0, "--class", 1, "--guidance", 3)
    assert facts(tmp_path / "out", 1)["conditions"] == {"class": 1, "segmentation": str(label_map)}
    assert "'class' is missing" in refused(*sample, tmp_path / "no")
    assert "class 2 is not one of the 2 classes" in refused(*sample, tmp_path / "no", "--class", 2)
    Image.new("L", (16, 16), 9).save(tmp_path / "nine.png")
    told = refused(*sample, tmp_path / "no", "--class", 1, "--segmentation", tmp_path / "nine.png")
    assert "label 9 is not one of the 5 labels" in told
    wrong = ("ar", "train", tmp_path / "ar.yaml", "-o", f"training.output={tmp_path / 'other'}")
    assert "condition.num_labels is 3" in refused(*wrong, "-o", "condition.conditions.1.num_labels=3")
    assert "two parts are given as 'class'" in refused(
        *wrong, "-o", "condition.conditions.1={kind: class, num_classes: 2}"
    )
