"""Batches in an order that is a pure function of (seed, step), however many processes share it.

Sample number g of a run (step * batch_size + position in the batch) is entry g % n of the shuffled order
of epoch g // n. Each rank takes its slice of every global batch, so that 1, 2 or 4 processes see the same
batches, and resuming at a step is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from taming.data.dataset import PictureDataset
from taming.errors import ConfigError, DataError
from taming.types import Batch

Slot = tuple[int, int]
"""(epoch, index): a sample and the epoch that decides its augmentation; epoch -1 means none."""


def train_batches(
    dataset: PictureDataset,
    *,
    batch_size: int,
    micro_batches: int = 1,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    workers: int = 0,
) -> Iterator[list[Batch]]:
    """Endless: item t is this rank's share of step start_step + t, as `micro_batches` batches.

    `batch_size` is the global number of pictures a step. Raises ConfigError if it does not divide among
    the ranks and micro-batches, DataError if there are no pictures or one of them cannot be read.
    """
    if batch_size < 1 or batch_size % (world_size * micro_batches):
        raise ConfigError(
            f"batch size {batch_size} does not divide into {world_size} processes x {micro_batches}"
            f" micro-batches; take a multiple of {world_size * micro_batches}"
        )
    if not len(dataset):
        raise DataError("there are no pictures to train on; check data.root and data.validation_fraction")
    share = batch_size // (world_size * micro_batches)
    length = len(dataset)

    def plan() -> Iterator[list[Slot]]:
        for step in count(start_step):
            for micro in range(micro_batches):
                first = step * batch_size + (rank * micro_batches + micro) * share
                yield [slot(seed, number, length) for number in range(first, first + share)]

    batches = _load(dataset, plan(), seed, workers)

    def steps() -> Iterator[list[Batch]]:
        while True:
            yield [next(batches) for _ in range(micro_batches)]

    return steps()


def evaluation_batches(
    dataset: PictureDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """The first `limit` samples in order, without augmentation, each on exactly one rank.

    Rank r takes samples r, r + world_size, ... in batches of batch_size / world_size (at least 1); the
    last batch may be smaller, and ranks may differ by one batch.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size} must be at least 1")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    indices = range(rank, total, world_size)
    share = max(1, batch_size // world_size)

    def plan() -> Iterator[list[Slot]]:
        for first in range(0, len(indices), share):
            yield [(-1, index) for index in indices[first : first + share]]

    return _load(dataset, plan(), 0, workers)


def slot(seed: int, number: int, length: int) -> Slot:
    """The sample that is the run's `number`-th, of a dataset of `length` samples."""
    epoch, place = divmod(number, length)
    return epoch, int(epoch_order(seed, epoch, length)[place])


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """A permutation of range(length), the same on every machine: keys from Philox, sorted."""
    random = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))
    return np.argsort(random.random(length), kind="stable")


def _load(
    dataset: PictureDataset, plan: Iterator[Sequence[Slot]], seed: int, workers: int
) -> Iterator[Batch]:
    if workers == 0:
        return (_fetch(dataset, slots, seed) for slots in plan)
    loader: DataLoader[Any] = DataLoader(
        _Slots(dataset, seed),
        sampler=_Plan(plan),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4,
        # Without its own, the loader would draw from torch's global stream, and training would differ by
        # the number of workers.
        generator=torch.Generator(),
        collate_fn=_as_it_is,  # torch's own would turn the tuples in a batch into lists
    )
    return _unwrap(loader)


def _fetch(dataset: PictureDataset, slots: Sequence[Slot], seed: int) -> Batch:
    return dataset.batch([index for _, index in slots], [epoch for epoch, _ in slots], seed=seed)


class _Slots(Dataset[Any]):
    """The dataset as torch sees it: its "index" is a whole batch of slots."""

    def __init__(self, dataset: PictureDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, slots: Sequence[Slot]) -> Batch | str:
        # torch would wrap an error from a worker in its traceback as text: carry the message instead.
        try:
            return _fetch(self.dataset, slots, self.seed)
        except DataError as error:
            return str(error)


class _Plan:
    def __init__(self, plan: Iterator[Sequence[Slot]]) -> None:
        self.plan = plan

    def __iter__(self) -> Iterator[Sequence[Slot]]:
        return self.plan


def _as_it_is(item: Any) -> Any:
    return item


def _unwrap(loader: DataLoader[Any]) -> Iterator[Batch]:
    for item in loader:
        if isinstance(item, str):
            raise DataError(item)
        yield item
