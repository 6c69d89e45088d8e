"""Tokenizers of label maps, depth, edges and arrays from the command line, and a fine-tuned decoder."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from stage1_vq import VQModel
from tests.conftest import TINY_MODEL, ar_values, vq_values
from tests.end_to_end.test_command_line import refused, succeeds, write_config

LABELS = 5


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Ten pictures of half-planes, with label and 16-bit depth maps."""
    generator = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth"):
        (tmp_path / "d" / folder).mkdir(parents=True)
    for number in range(10):
        labels = np.zeros((20, 24), np.uint8)
        labels[int(generator.integers(4, 16)) :] = generator.integers(1, LABELS)
        name = f"{number}.png"
        Image.fromarray(labels * 60).convert("RGB").save(tmp_path / "d/images" / name)
        Image.fromarray(labels).save(tmp_path / "d/segmentation" / name)
        Image.fromarray(labels.astype(np.uint16) * 13107).save(tmp_path / "d/depth" / name)
    return tmp_path / "d"


def values(root: Path, kind: str, in_channels: int, **data: Any) -> dict[str, Any]:
    found = vq_values(
        data={"kind": "folder", "root": str(root), "size": 16, **data},
        model={**TINY_MODEL, "input": kind, "in_channels": in_channels},
    )
    if kind == "segmentation":
        found |= {"loss": {"reconstruction": "bce", "perceptual_weight": 0}, "discriminator": None}
    return found


def test_label_maps_all_the_way(pairs: Path, tmp_path: Path) -> None:
    options = {"segmentation": "segmentation", "num_labels": LABELS}
    config = write_config(tmp_path / "labels.yaml", values(pairs, "segmentation", LABELS, **options))
    run = tmp_path / "run"
    assert "8x8 (f2)" in succeeds("vq", "train", config, "--dry-run")
    assert "pixel_accuracy" in succeeds("vq", "train", config, "-o", f"training.output={run}")
    assert list((run / "previews").glob("*.png"))

    out = tmp_path / "measured"
    succeeds("vq", "eval", run, config, "--split", "validation", "--out", out)
    metrics = json.loads((out / "metrics.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validation = [record for record in log if "pixel_accuracy" in record][-1]
    for name in ("pixel_accuracy", "mean_iou", "code_usage", "perplexity"):
        assert metrics[name] == pytest.approx(validation[name], rel=1e-4), name
    assert metrics["resize"].endswith("nearest")
    assert "psnr" not in metrics
    with (out / "pictures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["pictures"]
    assert rows[0].keys() == {"key", "pixel_accuracy", "mean_iou"}
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.mode == "RGB"

    # A plain folder of maps, as large as each is.
    succeeds("vq", "reconstruct", run, pairs / "segmentation", "--out", tmp_path / "painted")
    with Image.open(tmp_path / "painted/3.png") as painted:
        assert painted.size == (24, 20)
        assert painted.mode == "RGB"
    with Image.open(tmp_path / "painted/labels/3.png") as labels:
        assert np.asarray(labels).shape == (20, 24)
        assert np.asarray(labels).max() < LABELS
    succeeds("vq", "eval", run, pairs / "segmentation")
    succeeds("vq", "encode", run, pairs / "segmentation", "--out", tmp_path / "codes", "--size", "16")
    index = json.loads((tmp_path / "codes/index.json").read_text())
    assert index["grid"] == [8, 8]
    assert VQModel.from_pretrained(tmp_path / "codes/tokenizer").config.input == "segmentation"
    assert "--lpips looks at pictures" in refused("vq", "eval", run, pairs / "segmentation", "--lpips")
    assert "in_channels is 5" in refused("vq", "eval", run, "scenes")


@pytest.mark.parametrize(
    ("kind", "options"), [("depth", {"depth": "depth"}), ("edges", {}), ("image", {"channels": 1})]
)
def test_maps_of_one_channel(pairs: Path, tmp_path: Path, kind: str, options: dict) -> None:
    config = write_config(tmp_path / "c.yaml", values(pairs, kind, 1, **options))
    run = tmp_path / "run"
    succeeds("vq", "train", config, "-o", f"training.output={run}")
    succeeds("vq", "eval", run, config, "--out", tmp_path / "out")
    assert {"psnr", "ssim", "l1"} <= json.loads((tmp_path / "out/metrics.json").read_text()).keys()
    source = pairs / ("depth" if kind == "depth" else "images")
    succeeds("vq", "reconstruct", run, source, "--out", tmp_path / "painted")
    with Image.open(tmp_path / "painted/0.png") as painted:
        assert painted.mode == ("I;16" if kind == "depth" else "L")


def test_a_transformer_writes_codes_of_depth(pairs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", values(pairs, "depth", 1, depth="depth"))
    succeeds("vq", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    data = {"kind": "folder", "root": str(pairs), "size": 16}
    asked = ar_values(data=data, tokenizer=str(tmp_path / "run"), condition={"kind": "none"})
    config = write_config(tmp_path / "ar.yaml", asked)
    assert "model.input depth needs depth, but the data gives image" in refused("ar", "train", config)
    model = tmp_path / "ar"
    succeeds("ar", "train", config, "-o", "data.depth=depth", "-o", f"training.output={model}")
    succeeds("ar", "sample", model, "--out", tmp_path / "out", "--num", 1)
    with Image.open(tmp_path / "out/0000.png") as sample:
        assert sample.size == (16, 16)


@pytest.mark.slow
def test_perceptual_figures_from_files_of_weights(pairs: Path, tmp_path: Path) -> None:
    """With random weights in the files: how they travel, not what they mean."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    vgg = torchvision.models.vgg16(weights=None).features.state_dict()
    torch.save({f"features.{key}": value for key, value in vgg.items()}, tmp_path / "vgg.pth")
    with (
        mock.patch.object(package, "load_state_dict_from_url", return_value={}),
        mock.patch.object(torch.nn.Module, "load_state_dict"),
    ):
        inception = package.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.save(inception.state_dict(), tmp_path / "inception.pth")
    config = write_config(tmp_path / "c.yaml", values(pairs, "image", 3))
    succeeds("vq", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    weights = ("--vgg-weights", tmp_path / "vgg.pth", "--inception-weights", tmp_path / "inception.pth")
    asked = ("vq", "eval", tmp_path / "run", config, "--out", tmp_path / "out", "--lpips", "--fid")
    succeeds(*asked, *weights)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["lpips"] > 0
    assert metrics["reconstruction_fid"] > 0
    assert "Inception" in metrics["fid_extractor"]
    assert "lpips" in (tmp_path / "out/pictures.csv").read_text().splitlines()[0]


def test_a_decoder_is_tuned_and_codes_stay(pairs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", values(pairs, "image", 3))
    succeeds("vq", "train", config, "-o", f"training.output={tmp_path / 'first'}")
    tune = ("-o", f"init_from={tmp_path / 'first'}", "-o", "train_only=decoder")
    succeeds("vq", "train", config, *tune, "-o", f"training.output={tmp_path / 'second'}")
    models = [VQModel.from_pretrained(tmp_path / name) for name in ("first", "second")]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(*(model.encode(images) for model in models))
    assert models[0].content_hash() != models[1].content_hash()
    assert "say which with init_from" in refused("vq", "train", config, "-o", "train_only=decoder")
    wider = ("-o", "model.z_channels=16")
    assert "z_channels: 8 there, 16 here" in refused("vq", "train", config, *tune, *wider)


def test_weights_that_are_missing_are_told_before_any_work(pairs: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", values(pairs, "image", 3))
    succeeds("vq", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    asked = ("vq", "eval", tmp_path / "run", config, "--out", tmp_path / "out")
    missing = tmp_path / "nowhere.pth"
    assert "inception weights" in refused(*asked, "--fid", "--inception-weights", missing)
    assert "nowhere.pth cannot be read" in refused(*asked, "--lpips", "--vgg-weights", missing)
    assert not (tmp_path / "out").exists()
