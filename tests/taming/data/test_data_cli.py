from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from taming.data.cli import app
from taming.data.config import FolderDataConfig
from taming.data.dataset import open_dataset
from taming.data.scenes import CLASS_NAMES, LABEL_NAMES, render_scene
from taming.errors import DataError, UserError


def test_written_scenes_are_a_folder_to_train_on(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    result = CliRunner().invoke(
        app, ["scenes", "--out", str(out), "--num", "6", "--size", "32x48", "--seed", "3"]
    )
    assert result.exit_code == 0, result.output
    assert "data.num_labels=7" in result.output
    dataset = open_dataset(
        FolderDataConfig(
            root=out,
            segmentation="segmentation",
            num_labels=len(LABEL_NAMES),
            depth="depth",
            size=[32, 48],
            validation_fraction=0,
        ),
        "train",
    )
    assert len(dataset) == 6
    rows = list(csv.DictReader((out / "labels.csv").open()))
    objects = json.loads((out / "objects.json").read_text())
    assert (out / "label_names.txt").read_text().split() == list(LABEL_NAMES)
    for index in range(6):
        scene, sample = render_scene(3, index, (32, 48)), dataset.sample(index, -1)
        assert sample["key"] == rows[index]["name"]
        assert torch.equal(sample["image"], torch.from_numpy(scene.image.transpose(2, 0, 1)))
        assert torch.equal(sample["segmentation"], torch.from_numpy(scene.segmentation).long())
        assert torch.allclose(sample["depth"][0], torch.from_numpy(scene.depth), atol=1e-5)
        assert rows[index]["class"] == CLASS_NAMES[scene.label]
        assert rows[index]["text"] == scene.text
        listed = [item for item in objects["annotations"] if item["image_id"] == index]
        assert [item["category_id"] for item in listed] == [item["label"] for item in scene.objects]
        x0, y0, x1, y1 = scene.objects[0]["box"]
        assert listed[0]["bbox"] == [x0 * 48, y0 * 32, (x1 - x0) * 48, (y1 - y0) * 32]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    arguments = ["scenes", "--out", str(tmp_path), "--size", "16", "--num"]
    refused = CliRunner().invoke(app, [*arguments, "2"])
    assert isinstance(refused.exception, DataError)
    assert "--overwrite" in str(refused.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # A shorter run leaves none of a longer one behind, and nobody else's files are touched.
    assert CliRunner().invoke(app, [*arguments, "5", "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "2", "--overwrite"]).exit_code == 0
    for name in ("images", "segmentation", "depth"):
        assert len(list((tmp_path / name).iterdir())) == 2
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_sizes_are_checked(tmp_path: Path) -> None:
    for size in ("big", "64x", "8", "64x64x64"):
        result = CliRunner().invoke(app, ["scenes", "--out", str(tmp_path / "out"), "--size", size])
        assert isinstance(result.exception, UserError), size
        assert "64x256" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_importing_the_commands_is_light() -> None:
    code = "import sys, taming.data.cli; print([m for m in ('numpy', 'torch', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
