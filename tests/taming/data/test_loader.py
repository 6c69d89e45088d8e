from __future__ import annotations

import random
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from taming.data.batch import to_device, validate_batch
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.dataset import PictureDataset, ScenesDataset, open_dataset
from taming.data.loader import evaluation_batches, train_batches
from taming.data.order import epoch_order
from taming.errors import ConfigError, DataError
from taming.types import Batch


class Numbers(PictureDataset):
    """Samples that tell what was asked for."""

    def __init__(self, length: int) -> None:
        self.size, self.provides, self.class_names, self.num_labels = (1, 1), frozenset({"key"}), [], 0
        self.length = length

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        return {"key": (index, epoch, seed)}

    def fingerprint(self) -> str:
        return "0" * 64


def keys(steps: list[list[Batch]]) -> list[list[Any]]:
    return [[key for batch in step for key in batch["key"]] for step in steps]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 40), share=st.integers(1, 3), seed=st.integers(0, 2**40), start=st.integers(0, 60)
)
def test_the_global_batch_is_the_same_for_any_number_of_processes(
    length: int, share: int, seed: int, start: int
) -> None:
    dataset, batch_size = Numbers(length), 4 * share

    def run(world_size: int, micro_batches: int, start_step: int, steps: int) -> list[list[Any]]:
        ranks = [
            keys(
                list(
                    islice(
                        train_batches(
                            dataset,
                            batch_size=batch_size,
                            micro_batches=micro_batches,
                            seed=seed,
                            rank=rank,
                            world_size=world_size,
                            start_step=start_step,
                        ),
                        steps,
                    )
                )
            )
            for rank in range(world_size)
        ]
        return [[key for rank in ranks for key in rank[step]] for step in range(steps)]

    whole = run(1, 1, 0, start + 4)
    assert all(len(step) == batch_size for step in whole)
    for world_size, micro_batches in ((1, 2), (2, 1), (2, 2), (4, 1)):
        assert run(world_size, micro_batches, start, 4) == whole[start:]
    # Each sample exactly once an epoch, whole epochs one after another.
    stream = [key for step in whole for key in step]
    for epoch in range(len(stream) // length):
        part = stream[epoch * length : (epoch + 1) * length]
        assert sorted(part) == [(index, epoch, seed) for index in range(length)]


def test_orders_differ_by_seed_and_epoch() -> None:
    orders = {(seed, epoch): epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    # Written down, so that no later change reorders a run that is resumed.
    assert epoch_order(0, 0, 10).tolist() == EXPECTED_ORDER


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(0, 30),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    limit=st.none() | st.integers(0, 40),
)
def test_evaluation_takes_every_sample_once(
    length: int, world_size: int, batch_size: int, limit: int | None
) -> None:
    ranks = [
        [
            key
            for batch in evaluation_batches(
                Numbers(length), batch_size=batch_size, rank=rank, world_size=world_size, limit=limit
            )
            for key in batch["key"]
        ]
        for rank in range(world_size)
    ]
    expected = [(index, -1, 0) for index in range(length if limit is None else min(limit, length))]
    assert sorted(key for rank in ranks for key in rank) == expected
    if world_size == 1:
        assert ranks[0] == expected


def equal(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]
        for name, value in first.items()
    )


@pytest.mark.parametrize("length", [1, 2, 5])
def test_fewer_samples_than_a_batch_are_taken_again_and_again(length: int) -> None:
    options: dict[str, Any] = {"batch_size": 8, "micro_batches": 2, "seed": 1}
    alone = keys(list(islice(train_batches(Numbers(length), **options), 4)))
    stream = [key for step in alone for key in step]
    for epoch in range(len(stream) // length):
        part = stream[epoch * length : (epoch + 1) * length]
        assert sorted(part) == [(index, epoch, 1) for index in range(length)]
    helped = train_batches(Numbers(length), **options, workers=3)
    assert keys(list(islice(helped, 4))) == alone
    helped.close()
    for rank in (0, 1):  # each takes its share of each micro-batch's place in the step
        shared = train_batches(Numbers(length), **options, rank=rank, world_size=2)
        assert keys(list(islice(shared, 4))) == [step[4 * rank : 4 * rank + 4] for step in alone]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluations_of_fewer_samples_than_processes_or_workers(workers: int) -> None:
    for length, world_size, expected in ((1, 3, [1, 0, 0]), (5, 4, [2, 1, 1, 1]), (0, 2, [0, 0])):
        counts = []
        for rank in range(world_size):
            batches = evaluation_batches(
                Numbers(length), batch_size=64, rank=rank, world_size=world_size, workers=workers
            )
            counts.append(sum(len(batch["key"]) for batch in batches))
            assert next(batches, None) is None
        assert counts == expected


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_samples_are_the_same_with_any_number_of_workers(tmp_path: Path, workers: int) -> None:
    for n in range(6):
        pixels = np.random.default_rng(n).integers(0, 256, (40, 30 + n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    config = FolderDataConfig(root=tmp_path, size=24, random_scale=(1.0, 1.3), validation_fraction=0)
    dataset = open_dataset(config, "train")
    options: dict[str, Any] = {"batch_size": 4, "micro_batches": 2, "seed": 7, "start_step": 2}
    states = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    alone = list(islice(train_batches(dataset, **options), 9))
    helped = train_batches(dataset, **options, workers=workers)
    for first, second in zip(alone, islice(helped, 9), strict=True):
        assert all(map(equal, first, second))
        assert all(a["image"].stride() == b["image"].stride() for a, b in zip(first, second, strict=True))
    helped.close()
    now = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    assert states == now


@pytest.mark.parametrize("cache", [True, False])
def test_workers_give_the_same_batches(cache: bool) -> None:
    dataset = ScenesDataset(
        ScenesDataConfig(num_train=20, num_validation=5, size=32, flip=True, cache=cache), "train"
    )
    options: dict[str, Any] = {"batch_size": 8, "micro_batches": 2, "seed": 3, "start_step": 5}
    alone = list(islice(train_batches(dataset, **options), 3))
    state = torch.get_rng_state()
    helped = list(islice(train_batches(dataset, workers=2, **options), 3))
    assert torch.equal(torch.get_rng_state(), state)  # dropout must not depend on the workers
    assert all(
        equal(a, b)
        for first, second in zip(alone, helped, strict=True)
        for a, b in zip(first, second, strict=True)
    )
    evaluated = list(evaluation_batches(dataset, batch_size=8))
    assert [len(batch["key"]) for batch in evaluated] == [8, 8, 4]
    assert all(map(equal, evaluated, evaluation_batches(dataset, batch_size=8, workers=1)))


def test_a_step_far_away_is_reached_at_once() -> None:
    dataset = Numbers(1000)
    start = time.perf_counter()
    next(train_batches(dataset, batch_size=8, seed=0, start_step=10**9))
    assert time.perf_counter() - start < 1.0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_goes_bad_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    for n in range(4):
        Image.new("RGB", (16, 16), (n, n, n)).save(tmp_path / f"{n}.png")
    config = FolderDataConfig(root=tmp_path, size=16, validation_fraction=0, skip_budget=0)
    dataset = open_dataset(config, "train")
    (tmp_path / "2.png").write_bytes(b"not a picture any more")
    with pytest.raises(DataError, match=r"2\.png") as error:
        for _ in islice(train_batches(dataset, batch_size=4, seed=0, workers=workers), 2):
            pass
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_batch_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"batch size 6 .* 2 processes x 2 micro-batches; take a multiple of 4"
    ):
        train_batches(Numbers(3), batch_size=6, micro_batches=2, seed=0, world_size=2)
    with pytest.raises(DataError, match="no pictures"):
        train_batches(Numbers(0), batch_size=6, seed=0)


def test_scenes_dataset_gives_batches_of_every_kind() -> None:
    dataset = open_dataset(ScenesDataConfig(num_train=6, num_validation=3, size=[32, 48]), "train")
    assert dataset.size == (32, 48)
    assert len(dataset) == 6
    (batch,) = next(train_batches(dataset, batch_size=4, seed=0))
    validate_batch(batch, dataset.provides)
    assert set(batch) == dataset.provides
    assert batch["image"].shape == (4, 3, 32, 48)
    assert batch["image"].dtype == torch.uint8
    moved = to_device(batch, "cpu")
    assert moved["image"].min() >= -1
    assert moved["image"].max() <= 1
    assert torch.equal(((moved["image"] + 1) * 127.5).round().to(torch.uint8), batch["image"])
    assert moved["segmentation"].dtype == moved["label"].dtype == torch.int64
    assert moved["depth"].shape == (4, 1, 32, 48)
    sample = dataset.sample(2, -1)
    assert sample["key"] == "scene-0-000002"
    assert sample["image"].shape == (3, 32, 48)
    assert isinstance(sample["label"], int)


def test_scene_splits_differ_and_flips_are_joint() -> None:
    config = ScenesDataConfig(num_train=40, num_validation=3, flip=True)
    train, validation = open_dataset(config, "train"), open_dataset(config, "validation")
    assert train.fingerprint() != validation.fingerprint()
    assert not torch.equal(train.sample(0, -1)["image"], validation.sample(0, -1)["image"])
    plain, turned = Counter[bool](), 0
    for index in range(40):
        still, moved = train.sample(index, -1), train.sample(index, 7, seed=1)
        flipped = not torch.equal(still["image"], moved["image"])
        plain[flipped] += 1
        for name in ("image", "segmentation", "depth"):
            assert torch.equal(still[name].flip(-1) if flipped else still[name], moved[name])
        if flipped:
            turned += 1
            for before, after in zip(still["objects"], moved["objects"], strict=True):
                x0, y0, x1, y1 = before["box"]
                assert after["box"] == (1 - x1, y0, 1 - x0, y1)
    assert 10 <= turned <= 30
    # The cache itself is never turned.
    assert np.array_equal(train.sample(0, -1)["image"], open_dataset(config, "train").sample(0, -1)["image"])


def test_validate_batch_names_what_is_missing_and_what_is_malformed() -> None:
    image = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(DataError, match=r"segmentation is needed too; set data\.segmentation"):
        validate_batch({"image": image, "key": ["a", "b"]}, {"image", "segmentation"})
    with pytest.raises(DataError, match=r"set data\.class_labels"):
        validate_batch({"image": image}, {"label"})
    bad: list[tuple[dict[str, Any], str]] = [
        ({"image": image, "segmentation": torch.zeros(2, 8, 8)}, "int64"),
        ({"image": image, "depth": torch.zeros(2, 3, 8, 8)}, "depth"),
        ({"image": image, "segmentation": torch.zeros(2, 8, 9, dtype=torch.int64)}, "size"),
        ({"image": image, "key": ["a"]}, "number of samples"),
        ({"image": image, "labels": torch.zeros(2)}, "unknown key 'labels'"),
        ({"image": image[0]}, "4 axes"),
    ]
    for batch, message in bad:
        with pytest.raises(DataError, match=message):
            validate_batch(batch, ["image"])


EXPECTED_ORDER = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_crops_of_scenes_are_parts_of_whole_ones() -> None:
    options: dict[str, Any] = {"num_train": 3, "seed": 5}
    whole = ScenesDataset(ScenesDataConfig(size=[48, 72], **options), "train")
    for flip in (False, True):
        config = ScenesDataConfig(size=[32, 24], crop_from=[48, 72], flip=flip, **options)
        cropped = ScenesDataset(config, "train")
        assert "crop" in cropped.provides
        assert cropped.size == (32, 24)
        batch = to_device(cropped.batch([0, 1, 2] * 4, [0, 0, 0, 1, 1, 1, 2, 2, 2, -1, -1, -1]), "cpu")
        validate_batch(batch, cropped.provides)
        of = to_device(whole.batch([0, 1, 2] * 4, [-1] * 12), "cpu")
        mirrored, told = 0, []
        for n, (x0, y0, x1, y1) in enumerate(batch["crop"].double().tolist()):
            rows = slice(round(y0 * 48), round(y1 * 48))
            agree = []
            for mirror in (False, True):
                # The frame lies in the mirrored picture where the crop is mirrored.
                columns = slice(round(x0 * 72), round(x1 * 72))
                for name in ("image", "segmentation", "depth"):
                    picture = of[name][n].flip(-1) if mirror else of[name][n]
                    agree.append(torch.equal(batch[name][n], picture[..., rows, columns]))
                if all(agree[-3:]):
                    mirrored += mirror
                    for item in batch["objects"][n]:
                        a, b, c, d = item["box"]
                        part = batch["segmentation"][
                            n, round(b * 32) : round(d * 32), round(a * 24) : round(c * 24)
                        ]
                        told.append(bool((part == item["label"] + 2).any()))
            assert all(agree[:3]) or all(agree[3:])
        assert (0 < mirrored < 9) == flip
        assert len(told) > 20
        assert sum(told) / len(told) > 0.9  # nearer ones may hide all of a box's part
        assert batch["crop"][-1].tolist() == pytest.approx([24 / 72, 8 / 48, 48 / 72, 40 / 48])
        assert len({tuple(row) for row in batch["crop"].tolist()}) > 6
        again = cropped.batch([0, 1, 2], [1, 1, 1])
        assert torch.equal(again["image"], cropped.batch([2, 1, 0], [1, 1, 1])["image"].flip(0))
    plain = ScenesDataset(ScenesDataConfig(size=[32, 24], **options), "train")
    assert "crop" not in plain.provides
    assert len({plain.fingerprint(), cropped.fingerprint(), whole.fingerprint()}) == 3
    with pytest.raises(ValueError, match="crop_from 32x32 is smaller than the crop"):
        ScenesDataConfig(size=48, crop_from=32)
