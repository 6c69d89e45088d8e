"""Layouts and captions from nothing but files: `taming data scenes` to `taming ar sample`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ar_values, vq_values
from tests.end_to_end.test_command_line import refused, succeeds, write_config
from tests.stage2_ar.text_models import write_clip

OBJECTS = {"kind": "objects", "num_classes": 5, "max_objects": 8, "dropout": 0.2}
WORDS = {"kind": "text", "encoder": {"kind": "words", "max_length": 24, "hidden_width": 8}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vq")
    config = write_config(folder / "tiny.yaml", vq_values())
    succeeds("vq", "train", config, "-o", f"training.output={folder / 'run'}", "-o", "training.steps=2")
    return folder / "run"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "data"
    said = succeeds("data", "scenes", "--out", root, "--num", 12, "--size", 20)
    assert "data.objects=objects.json" in said
    assert "data.text=captions" in said
    return root


def written(tmp_path: Path, tokenizer: Path, condition: dict[str, Any], **data: Any) -> Path:
    values = ar_values(
        tokenizer=str(tokenizer),
        condition=condition,
        data={"kind": "folder", "size": 16, "validation_fraction": 0.3, **data},
    )
    return write_config(tmp_path / "ar.yaml", values)


def test_a_layout_from_files_to_pictures(tokenizer: Path, scenes: Path, tmp_path: Path) -> None:
    config = written(tmp_path, tokenizer, OBJECTS, root=str(scenes), objects="objects.json")
    run = tmp_path / "run"
    succeeds("ar", "train", config, "-o", f"training.output={run}")
    kept = yaml.safe_load((run / "config.yaml").read_text())["condition"]
    assert kept["names"] == ["house", "pine", "ball", "boulder", "haystack"]
    succeeds("ar", "train", config, "-o", f"training.output={run}")  # resumed: the same config again

    layout = {
        "objects": [{"label": "pine", "box": [0.1, 0.2, 0.5, 0.9]}, {"label": 0, "box": [0.5, 0, 1, 1]}]
    }
    (tmp_path / "one.json").write_text(json.dumps(layout))
    (tmp_path / "none.json").write_text('{"objects": []}')
    files = ["--objects", tmp_path / "one.json", "--objects", tmp_path / "none.json"]
    said = succeeds("ar", "sample", run, *files, "--num", 2, "--guidance", 2, "--out", tmp_path / "out")
    assert "4 pictures" in said
    facts = json.loads((tmp_path / "out/0001.json").read_text())
    assert facts["conditions"] == {"objects": layout["objects"]}
    assert json.loads((tmp_path / "out/0003.json").read_text())["conditions"] == {"objects": []}
    wide = ["--size", "16x24", "--num", 1, "--out", tmp_path / "wide"]
    succeeds("ar", "sample", run, "--objects", tmp_path / "one.json", *wide)

    bad = tmp_path / "bad.json"
    for objects, message in (
        ([{"label": "pin", "box": [0, 0, 1, 1]}], "'pin' is not one of the model's 5; near it, .* pine"),
        ([{"label": 7, "box": [0, 0, 1, 1]}], "label 7 is not one of the 5 classes"),
        ([{"label": 1, "box": [0, 0, 64, 64]}], "leaves the picture; boxes are shares"),
        ([{"label": 1, "box": [0.5, 0, 0.5, 1]}], "has no area"),
        ([{"label": 1, "box": [0, 0, 1, 1]}] * 9, "9 objects, but the model takes at most 8"),
        ([{"label": 1}], "is no object; write"),
        ({}, "is no layout; write"),
    ):
        bad.write_text(json.dumps({"objects": objects}))
        line = refused("ar", "sample", run, "--objects", bad, "--out", tmp_path / "never")
        assert re.search(message, line), line
    bad.write_text("{")
    assert "cannot be read as JSON" in refused(
        "ar", "sample", run, "--objects", bad, "--out", tmp_path / "never"
    )
    line = refused("ar", "sample", run, "--objects", tmp_path / "gone.json", "--out", tmp_path / "never")
    assert "there is no file" in line
    line = refused("ar", "sample", run, "--text", "a pine", "--out", tmp_path / "never")
    assert "no condition 'text'; it takes 'objects'" in line
    assert "'objects' is missing" in refused("ar", "sample", run, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_words_from_files_to_pictures(tokenizer: Path, scenes: Path, tmp_path: Path) -> None:
    config = written(tmp_path, tokenizer, WORDS, root=str(scenes), text="captions")
    run = tmp_path / "run"
    said = succeeds("ar", "train", config, "-o", f"training.output={run}", "--dry-run")
    assert "25 of the condition" in said
    succeeds("ar", "train", config, "-o", f"training.output={run}")
    text = "a pine under a clear sky"
    succeeds("ar", "sample", run, "--text", text, "--num", 1, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out/0000.json").read_text())["conditions"] == {"text": text}
    line = refused("ar", "sample", run, "--text", "a pime", "--out", tmp_path / "never")
    assert "the word 'pime' is not one of the" in line
    assert "near it are pine" in line
    assert "'text' is empty" in refused("ar", "sample", run, "--text", " ", "--out", tmp_path / "never")


def test_codes_keep_boxes_and_captions(tokenizer: Path, scenes: Path, tmp_path: Path) -> None:
    data = {"root": str(scenes), "objects": "objects.json", "text": "captions"}
    config = written(tmp_path, tokenizer, OBJECTS, **data)
    succeeds("vq", "encode", tokenizer, config, "--out", tmp_path / "codes", "--views", 2)
    both = {"kind": "combined", "conditions": [OBJECTS, WORDS], "dropout": 0.0}
    values = ar_values(data={"kind": "codes", "root": str(tmp_path / "codes")}, condition=both)
    config = write_config(tmp_path / "codes.yaml", values)
    succeeds("ar", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    (tmp_path / "one.json").write_text('{"objects": [{"label": "ball", "box": [0, 0, 1, 1]}]}')
    asked = ["--objects", tmp_path / "one.json", "--text", "a ball under a clear sky"]
    succeeds("ar", "sample", tmp_path / "run", *asked, "--num", 1, "--out", tmp_path / "out")
    said = json.loads((tmp_path / "out/0000.json").read_text())["conditions"]
    assert set(said) == {"objects", "text"}


def test_a_frozen_encoder_from_files_to_pictures(tokenizer: Path, scenes: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip")
    encoder = {"kind": "transformers", "name": str(clip), "max_length": 20, "disk_cache": True}
    condition = {"kind": "text", "encoder": encoder}
    config, run = written(tmp_path, tokenizer, condition, root=str(scenes), text="captions"), tmp_path / "run"
    succeeds("ar", "train", config, "-o", f"training.output={run}")
    assert any((run / "text_features").rglob("*.safetensors"))
    shutil.move(run / "model", tmp_path / "taken")
    shutil.rmtree(clip)
    succeeds("ar", "sample", tmp_path / "taken", "--text", "a ball", "--num", 1, "--out", tmp_path / "out")
    line = refused("ar", "sample", tmp_path / "taken", "--text", "b" * 30, "--out", tmp_path / "never")
    assert "more than the 20 tokens" in line
    line = refused("ar", "train", config, "-o", f"training.output={tmp_path / 'other'}")
    assert "no folder" in line
    assert "text encoder" in line


@pytest.mark.parametrize(
    ("condition", "data", "message"),
    [
        (OBJECTS, {}, "set data.objects to a JSON of COCO annotations"),
        (OBJECTS, {"objects": "gone.json"}, "there is no file"),
        (OBJECTS, {"objects": "labels.csv"}, "cannot be read as JSON"),
        ({**OBJECTS, "num_classes": 3}, {"objects": "objects.json"}, "set condition.num_classes=5"),
        (WORDS, {}, "set data.text to a folder of NAME.txt files"),
        (WORDS, {"text": "gone"}, "is neither a folder of .txt files nor a .json file"),
        (WORDS, {"text": "depth"}, "has no caption in"),
    ],
)
def test_training_without_what_it_needs(
    tokenizer: Path,
    scenes: Path,
    tmp_path: Path,
    condition: dict[str, Any],
    data: dict[str, Any],
    message: str,
) -> None:
    config = written(tmp_path, tokenizer, condition, root=str(scenes), **data)
    assert message in refused("ar", "train", config, "-o", f"training.output={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()
