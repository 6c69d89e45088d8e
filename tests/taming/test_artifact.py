"""Models on disk: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from taming.artifact import content_hash, load_artifact, load_state, save_artifact
from taming.config import Config
from taming.errors import ArtifactError


class ThingConfig(Config):
    width: int = 3


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "thing", "thing", ThingConfig(), nn.Linear(3, 2).state_dict(), facts={"a": 1})
    return tmp_path / "thing"


def test_round_trip_of_layouts_shared_memory_and_scalars(tmp_path: Path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    state = {"weight": weight, "same": weight, "count": torch.tensor(3), "flag": torch.tensor(True)}
    state["half"] = torch.randn(3).bfloat16()
    save_artifact(tmp_path, "thing", ThingConfig(width=7), state)
    config, loaded = load_artifact(tmp_path, "thing")
    assert config == {"width": 7}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert content_hash(loaded) == content_hash(state)
    assert json.loads((tmp_path / "config.json").read_text())["content_hash"] == content_hash(state)


def test_hash_sees_names_types_shapes_and_values():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(2, 3), "c": torch.ones(2)},
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.0001])},
    ]
    hashes = {content_hash(state) for state in [base, *others]}
    assert len(hashes) == 5
    assert content_hash(dict(reversed(base.items()))) == content_hash(base)


def test_another_kind_is_refused(saved: Path):
    with pytest.raises(ArtifactError, match="holds a model of kind 'thing', not 'other'"):
        load_artifact(saved, "other")


def test_what_is_missing_or_damaged_is_named(saved: Path, tmp_path: Path):
    with pytest.raises(ArtifactError, match="no folder 'nowhere'"):
        load_artifact("nowhere", "thing")
    with pytest.raises(ArtifactError, match=r"holds no config\.json"):
        load_artifact(tmp_path, "thing")
    (saved / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        load_artifact(saved, "thing")
    (saved / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read"):
        load_artifact(saved, "thing")
    (saved / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ArtifactError, match="does not describe a model of this toolkit"):
        load_artifact(saved, "thing")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 2, bias=False), r"1 keys are not expected \(bias\)"),
        (nn.Linear(4, 2), r"weight is \(2, 3\) there and \(2, 4\)"),
        (nn.Bilinear(3, 3, 2), r"weight is"),
        (nn.Sequential(nn.Linear(3, 2)), "2 keys are missing"),
    ],
)
def test_state_that_does_not_fit_is_named(saved: Path, module: nn.Module, message: str):
    _, state = load_artifact(saved, "thing")
    with pytest.raises(ArtifactError, match=message):
        load_state(module, state, source=saved)
