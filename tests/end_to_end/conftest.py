"""What several tests of commands stand on: saved models, and a canary that nothing may make."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from taming.config import build_config
from tests.conftest import TINY_MODEL, make_pipeline
from tests.end_to_end.strangers import Payload


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What no test may ever make; and that each payload would, if something loaded it."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    before = sorted(item.name for item in tmp_path.iterdir())
    yield path
    assert not path.exists()
    assert not (tmp_path.parent / "canary").exists()
    assert before == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer (vq), and pipelines with it: by class (ar), and by depth."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = VQModel(build_config(VQModelConfig, TINY_MODEL)).eval()
    tokenizer.save_pretrained(folder / "vq")
    make_pipeline(tokenizer, {"kind": "class", "num_classes": 4}).save_pretrained(folder / "ar")
    make_pipeline(tokenizer, {"kind": "depth", "hidden_width": 8}).save_pretrained(folder / "depth")
    return folder


@pytest.fixture
def work(tmp_path: Path, canary: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder
