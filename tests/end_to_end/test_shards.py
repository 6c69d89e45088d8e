"""A run on shards is the run on the folder that they were packed from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ar_values, vq_values
from tests.end_to_end.test_command_line import succeeds, write_config
from tests.taming.data.shard_data import LAYOUT, write_everything


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder and its pack, made by the command."""
    root = tmp_path_factory.mktemp("data")
    write_everything(root / "folder", count=12)
    options = [word for name, value in LAYOUT.items() for word in ("-o", f"data.{name}={value}")]
    succeeds("data", "pack", root / "folder", "--out", root / "pack", "--samples-per-shard", "5", *options)
    return root


def losses(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, without times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in record.items() if "loss" in name or name == "step"} for record in records]


def test_a_codebook_learns_the_same_from_shards(data: Path, tmp_path: Path) -> None:
    values = {"kind": "folder", "root": str(data / "folder"), "size": 16, "random_scale": [1.0, 1.2]}
    config = write_config(tmp_path / "vq.yaml", vq_values(data=values))
    switch = ("-o", "data.kind=shards", "-o", f"data.root={data / 'pack'}")
    for name, options in {"folder": (), "pack": switch}.items():
        succeeds("vq", "train", config, "-o", f"training.output={tmp_path / name}", *options)
        succeeds("vq", "eval", tmp_path / name, data / name, "--out", tmp_path / f"{name}-eval")
    assert losses(tmp_path / "folder") == losses(tmp_path / "pack") != []
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("folder", "pack")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
    figures = [(tmp_path / f"{name}-eval/metrics.json").read_text() for name in ("folder", "pack")]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_all_commands_take_shards(data: Path, tmp_path: Path) -> None:
    """Stage one, codes, stage two and their figures, from a pack alone."""
    pack = data / "pack"
    shards = {"kind": "shards", "root": str(pack), "size": 16}
    config = write_config(tmp_path / "vq.yaml", vq_values(data=shards))
    succeeds("vq", "train", config, "-o", f"training.output={tmp_path / 'vq'}")
    succeeds("vq", "reconstruct", tmp_path / "vq", pack, "--out", tmp_path / "restored")
    assert len(list((tmp_path / "restored").rglob("picture*.png"))) == 12
    succeeds("vq", "encode", tmp_path / "vq", pack, "--out", tmp_path / "codes", "--views", "2")
    index = json.loads((tmp_path / "codes/index.json").read_text())
    assert set(index["provides"]) == {"label", "segmentation", "depth", "crop", "text", "objects"}
    condition = {"kind": "segmentation", "num_labels": 5, "hidden_width": 8, "label_dim": 4}
    sources: dict[str, dict[str, Any]] = {
        "pictures": {**shards, "segmentation": True, "num_labels": 5},
        "codes": {"kind": "codes", "root": str(tmp_path / "codes")},
    }
    for name, source in sources.items():
        run = tmp_path / f"ar-{name}"
        values = ar_values(data=source, condition=condition, tokenizer=str(tmp_path / "vq"))
        succeeds("ar", "train", write_config(tmp_path / "ar.yaml", values), "-o", f"training.output={run}")
        succeeds("ar", "eval", run, pack, "--out", run / "eval")
        assert json.loads((run / "eval/metrics.json").read_text())["pictures"] == 12
    succeeds("data", "check", pack)
    succeeds("doctor", "--data", pack, "--size", "16")
