"""Bad samples of a run: counted, told with measure, and too many of them end it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_vq.train import train
from taming.data.config import ScenesDataConfig
from taming.data.dataset import ScenesDataset
from taming.errors import DataError
from taming.training import loop
from taming.training.checkpoint import list_checkpoints
from taming.training.skipped import Skipped
from tests.conftest import TINY_TRAINING, vq_config


def data(length: int, budget: float) -> ScenesDataset:
    dataset = ScenesDataset(ScenesDataConfig(num_train=length, size=16), "train")
    dataset.skip_budget = budget
    return dataset


def test_the_budget_is_a_share_of_the_data_or_of_what_was_seen() -> None:
    skipped = Skipped(data(100, 0.02))
    assert skipped.add(Counter(), 4) is None
    skipped.add(Counter(truncated=1), 8)
    skipped.add(Counter(missing=1), 100)
    with pytest.raises(DataError, match=r"3 bad samples \(1 missing, 2 truncated\) of 149 are more than"):
        skipped.add(Counter(truncated=1), 149)
    Skipped(data(100, 0.02), {"truncated": 2}).add(Counter(truncated=1), 150)
    with pytest.raises(DataError, match="skip_budget = 0 "):
        Skipped(data(100, 0)).add(Counter(missing=1), 4)


def test_new_reasons_are_told_and_then_powers_of_ten() -> None:
    skipped, told = Skipped(data(100_000, 0.5)), []
    for number in range(1, 201):
        if skipped.add(Counter(missing=1) if number != 50 else Counter(truncated=1), number):
            told.append(number)
    assert told == [1, 10, 50, 100]


def test_a_run_over_bad_pictures_goes_on_counts_them_and_resumes_with_the_count(tmp_path: Path) -> None:
    for n in range(12):
        noise = np.random.default_rng(n).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n:02}.png")
    values = {"kind": "folder", "root": str(tmp_path), "size": 16, "validation_fraction": 0.2, "flip": False}

    def run(name: str, steps: int, budget: float) -> list[str]:
        config = vq_config(
            data={**values, "skip_budget": budget}, training={**TINY_TRAINING, "steps": steps, "output": name}
        )
        real = loop.train_batches

        def after_opening(dataset, **options):  # type: ignore[no-untyped-def]
            bad = dataset.entries[3].path
            bad.write_bytes(bad.read_bytes()[:200])
            return real(dataset, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_batches", after_opening)
            return list(train(config, tmp_path.parent / name).notes)

    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (note,) = run("run", 4, 0.5)
    assert "bad samples replaced by others so far: 1" in note
    assert "04.png is cut off" in note
    checkpoint = list_checkpoints(tmp_path.parent / "run/checkpoints")[-1]
    counts = json.loads((checkpoint / "progress.json").read_text())["skipped"]
    assert counts == {"truncated": 2}
    for path, content in before.items():  # whole when it is opened again: the data is the same
        path.write_bytes(content)
    with pytest.raises(DataError, match="3 bad samples"):
        run("run", 12, 0.05)
    for path, content in before.items():
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"04\.png is cut off"):
        run("strict", 4, 0.0)
