"""Bad pictures within the budget and beyond it: when a folder is opened, in training, in evaluation."""

from __future__ import annotations

import errno
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming.data import patience
from taming.data.config import FolderDataConfig
from taming.data.dataset import PictureDataset, Split, open_dataset
from taming.data.folder import FolderDataset
from taming.data.loader import evaluation_batches, substitute, train_batches
from taming.data.picture import read_picture
from taming.data.source import open_split, open_splits
from taming.errors import BadSample, DataError, DataWarning

COUNT = 20
SPLITS: tuple[Split, ...] = ("train", "validation")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures 00 to 19 of one value each, with label maps."""
    for n in range(COUNT):
        for name, mode in (("images", "RGB"), ("labels", "L")):
            path = tmp_path / name / f"{n:02}.png"
            path.parent.mkdir(exist_ok=True)
            noise = np.random.default_rng(n).integers(0, 200, (16, 16), dtype=np.uint8)
            Image.fromarray(noise // 100 if mode == "L" else noise).convert(mode).save(path)
    return tmp_path


def opened(root: Path, split: Any = "train", **options: Any) -> PictureDataset:
    values = {"size": 16, "validation_fraction": 0.0, "flip": False, **options}
    return open_dataset(FolderDataConfig(root=root, **values), split)


def truncate(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


MAPS: dict[str, Any] = {"segmentation": "labels", "num_labels": 2}


def test_what_is_bad_on_opening_is_left_out_and_told(folder: Path) -> None:
    (folder / "images/03.png").write_bytes(b"no picture")
    (folder / "images/04.png").write_bytes(b"")
    Image.new("RGB", (8, 30)).save(folder / "images/05.png")
    (folder / "labels/06.png").unlink()
    truncate(folder / "labels/07.png")
    Image.new("L", (30, 16)).save(folder / "labels/08.png")
    Image.new("L", (16, 16), 7).save(folder / "labels/09.png")
    bad = {f"{n:02}" for n in range(3, 10)}
    dataset = opened(folder, skip_budget=0.35, **MAPS)
    keys = [dataset.sample(n, -1)["key"] for n in range(len(dataset))]
    assert keys == sorted({f"{n:02}" for n in range(COUNT)} - bad)
    (note,) = dataset.notes
    counted = "3 mismatched, 1 missing, 2 truncated, 1 unreadable"
    assert note.startswith(f"left {counted} out of 20 pictures; ")
    for text in ("05.png is 8x30, smaller", "06.png has no map", "04.png", "03.png"):
        assert text in note
    with pytest.raises(DataError, match=rf"7 of 20 .*{counted}.*data.skip_budget = 0.3 .*taming data check"):
        opened(folder, skip_budget=0.3, **MAPS)
    with pytest.raises(
        DataError, match=r"06.png has no map.*; 1 of 20 pictures cannot be used \(1 missing\)"
    ):
        opened(folder, skip_budget=0, **MAPS)
    for name in sorted(bad):
        for kind in ("images", "labels"):
            (folder / kind / f"{name}.png").unlink(missing_ok=True)
    assert not opened(folder, skip_budget=0, **MAPS).notes


def test_what_is_left_out_is_told_before_training_and_before_measuring(folder: Path) -> None:
    config = FolderDataConfig(root=folder / "images", size=16, validation_fraction=0.3, skip_budget=0.2)
    keys = {split: [entry.key for entry in FolderDataset(config, split).entries] for split in SPLITS}
    for split in SPLITS:
        (folder / f"images/{keys[split][0]}.png").write_bytes(b"")
    train, validation = open_splits(config)
    assert len(train.notes) == 2
    assert train.notes[0].startswith("left 1 truncated out of 20 pictures; ")
    assert train.notes[1].startswith("of those to evaluate on: left 1 truncated out of 20 pictures; ")
    assert f"{keys['validation'][0]}.png" in train.notes[1]
    with pytest.warns(DataWarning, match="left 1 truncated") as told:
        whole = open_split(config, "all")
    assert len(told) == 2
    assert len(whole) == len(train) + len(validation) == COUNT - 2
    assert whole.skip_budget == 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split in SPLITS:
            (folder / f"images/{keys[split][0]}.png").unlink()
        open_split(config, "all")


def test_classes_keep_their_numbers_when_all_pictures_of_one_are_left_out(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "c/1.png", "c/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (tmp_path / "b/1.png").write_bytes(b"")
    dataset = opened(tmp_path, class_labels=True, skip_budget=0.5)
    assert dataset.class_names == ["a", "b", "c"]
    assert [dataset.sample(n, -1)["label"] for n in range(3)] == [0, 2, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_that_go_bad_in_training_are_replaced_and_counted(folder: Path, workers: int) -> None:
    dataset = opened(folder, skip_budget=0.5)
    whole = opened(folder)
    expected = list(islice(train_batches(whole, batch_size=8, seed=3), 5))
    (folder / "images/07.png").unlink()
    truncate(folder / "images/11.png", 0.5)
    for rank in (0, 1):
        batches = train_batches(
            dataset, batch_size=8, micro_batches=2, seed=3, rank=rank, world_size=2, workers=workers
        )
        counted: Counter[str] = Counter()
        for step, micro_batches in enumerate(islice(batches, 5)):
            taken = batches.take_skipped()
            counted += taken
            keys = [key for batch in micro_batches for key in batch["key"]]
            images = torch.cat([batch["image"] for batch in micro_batches])
            asked = expected[step][0]["key"][4 * rank : 4 * rank + 4]
            assert taken.total() == sum(key in ("07", "11") for key in asked)
            for key, image, before in zip(keys, images, asked, strict=True):
                if before in ("07", "11"):  # what takes its place is a function of seed, epoch and sample
                    first = (8 * step) // COUNT
                    tries = (
                        substitute(3, epoch, int(before), attempt, COUNT)
                        for attempt in range(9)
                        for epoch in (first, first + 1)
                    )
                    assert int(key) in tries
                else:
                    assert key == before
                assert torch.equal(image, whole.sample(int(key), -1)["image"])
        assert counted == batches.take_skipped() + counted  # taken once
        assert set(counted) <= {"missing", "truncated", "unreadable"}
        assert counted["missing"] > 0
        assert "07.png" in batches.examples["missing"]
        batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_leaves_bad_pictures_out_and_says_so(folder: Path, workers: int) -> None:
    dataset = opened(folder, skip_budget=0.2)
    for n in (1, 2, 3):
        (folder / f"images/{n:02}.png").unlink()
    batches = evaluation_batches(dataset, batch_size=2, workers=workers)
    with pytest.warns(
        UserWarning, match=r"left out of the evaluation so far: 1 missing \(first: picture .*01\.png"
    ):
        keys = [batch["key"] for batch in batches]
    assert [key for batch in keys for key in batch] == ["00", *(f"{n:02}" for n in range(4, COUNT))]
    assert len(keys) == 9  # of two samples of a batch, both were bad
    assert batches.skipped == {"missing": 3}
    for n in (4, 5):
        truncate(folder / f"images/{n:02}.png")
    with (
        pytest.raises(DataError, match=r"3 missing .*truncated.*more of the 20 .*skip_budget = 0.2"),
        pytest.warns(UserWarning, match="3 missing"),
    ):
        list(evaluation_batches(dataset, batch_size=4, workers=workers))
    dataset.skip_budget = 0
    with pytest.raises(BadSample, match=r"01\.png"):
        list(evaluation_batches(dataset, batch_size=4))


def test_trouble_that_passes_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = opened(folder, skip_budget=0)
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    troubles = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT]
    real = Image.open

    def flaky(*arguments: Any, **options: Any) -> Any:
        if troubles:
            number = troubles.pop()
            raise OSError(number, "trouble")
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", flaky)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = next(evaluation_batches(dataset, batch_size=4))
    assert len(batch["key"]) == 4
    # The first was met reading the batch as a whole.
    assert waits == list(patience.PAUSES_SECONDS[:2])
    troubles += [errno.EIO] * 9
    with pytest.raises(BadSample, match="trouble"):
        next(evaluation_batches(dataset, batch_size=1))
    assert len(waits) == 2 + len(patience.PAUSES_SECONDS)
    troubles[:] = [errno.EACCES]
    with pytest.raises(BadSample):
        patience.patiently(lambda: read_picture(folder / "images/00.png"))
    assert len(waits) == 2 + len(patience.PAUSES_SECONDS)
