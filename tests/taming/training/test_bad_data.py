"""Runs whose pictures go bad or whose data workers die."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stage1_vq.config import VQTrainConfig
from stage1_vq.train import train
from taming.data.folder import FolderDataset
from taming.errors import DataError, FaultError
from taming.training import loop
from tests.conftest import TINY_TRAINING, vq_config

COUNT = 16
TRAINING: dict[str, Any] = {
    **TINY_TRAINING, "steps": 14, "evaluate_every": 7, "preview_every": 14, "checkpoint_every": 4,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n in range(COUNT):
        pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n:02}.png")
    return folder


def config(pictures: Path, *, workers: int = 0, **data: Any) -> VQTrainConfig:
    values = {"kind": "folder", "root": str(pictures), "size": 16, "validation_fraction": 0.2, **data}
    return vq_config(data=values, training={**TRAINING, "workers": workers})


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    real, done = loop._Sums.add, []

    def add(self: loop._Sums, values: Any) -> None:
        real(self, values)
        done.append(1)
        if len(done) == step:
            action()

    monkeypatch.setattr(loop._Sums, "add", add)


def test_a_dead_worker_ends_the_run_in_one_line_and_it_goes_on(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(multiprocessing.active_children())

    def kill_one() -> None:
        workers = list(set(multiprocessing.active_children()) - others)
        assert len(workers) == 2
        assert workers[1].pid is not None
        os.kill(workers[1].pid, signal.SIGKILL)

    at_step(monkeypatch, 1, kill_one)
    with pytest.raises(FaultError, match=r"a data worker \(pid \d+\) of process 0 was killed"):
        train(config(pictures, workers=2), tmp_path / "run")
    monkeypatch.undo()
    gc.collect()  # the error held the frames that held the loader
    assert not set(multiprocessing.active_children()) - others
    assert train(config(pictures, workers=2), tmp_path / "run").steps == 14


def test_pictures_that_vanish_in_training_count_against_the_budget(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = [FolderDataset(config(pictures).data, split) for split in ("train", "validation")]  # type: ignore[arg-type]
    train_paths, validation_paths = ([entry.path for entry in data.entries] for data in sets)

    def spoil() -> None:
        train_paths[0].unlink()
        validation_paths[0].write_bytes(b"")

    at_step(monkeypatch, 2, spoil)
    with pytest.warns(UserWarning, match="left out of the evaluation so far: 1 truncated"):
        result = train(config(pictures, skip_budget=0.4), tmp_path / "run")
    assert any("bad samples replaced by others so far: 1 missing" in note for note in result.notes)
    monkeypatch.undo()
    validation_paths[0].unlink()

    def truncate() -> None:
        train_paths[1].write_bytes(train_paths[1].read_bytes()[:-40])

    at_step(monkeypatch, 2, truncate)
    with pytest.raises(DataError, match=r"1 truncated.*data\.skip_budget = 0\.001 .*taming data check"):
        train(config(pictures, skip_budget=0.001), tmp_path / "strict")
