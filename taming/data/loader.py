"""Batches in an order that is a pure function of (seed, step), however many processes share it.

Sample number g of a run (step * batch_size + position in the batch) is entry g % n of the shuffled order
of epoch g // n. Each rank takes its slice of every global batch, so that 1, 2 or 4 processes see the same
batches, and resuming at a step is arithmetic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from taming.data.batch import collate
from taming.data.dataset import PictureDataset
from taming.data.transforms import uniforms
from taming.errors import BadSample, ConfigError, DataError
from taming.types import Batch

Slot = tuple[int, int]
"""(epoch, index): a sample and the epoch that decides its augmentation; epoch -1 means none."""

SUBSTITUTES = 32
"""So many others are tried in place of a sample that is bad."""


@dataclass(frozen=True)
class _Loaded:
    """A batch, and how many bad samples were replaced in it, by reason."""

    batch: Batch
    skipped: Counter[str] = field(default_factory=Counter)


class TrainBatches(Iterator[list[Batch]]):
    """Endless: the micro-batches of one step after another."""

    def __init__(self, loaded: Iterator[_Loaded], micro_batches: int) -> None:
        self._loaded, self._micro_batches = loaded, micro_batches
        self._skipped: Counter[str] = Counter()

    def __next__(self) -> list[Batch]:
        loaded = [next(self._loaded) for _ in range(self._micro_batches)]
        for item in loaded:
            self._skipped += item.skipped
        return [item.batch for item in loaded]

    def take_skipped(self) -> Counter[str]:
        """Reason -> bad samples that were replaced in what was handed out since the last call."""
        taken, self._skipped = self._skipped, Counter()
        return taken


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
) -> TrainBatches:
    """Endless: item t is this rank's share of step start_step + t, as `micro_batches` batches.

    `batch_size` is the global number of pictures a step. Raises ConfigError if it does not divide among
    the ranks and micro-batches, DataError if there are no pictures or one of them cannot be read; where the
    dataset has a skip_budget, another takes the place of one that is bad.
    """
    if batch_size < 1 or batch_size % (world_size * micro_batches):
        raise ConfigError(
            f"batch size {batch_size} does not divide into {world_size} processes x {micro_batches}"
            f" micro-batches; take a multiple of {world_size * micro_batches}"
        )
    if not len(dataset):
        raise DataError("there are no pictures to train on; check data.root and data.validation_fraction")
    share = batch_size // (world_size * micro_batches)

    def plan() -> Iterator[list[Slot]]:
        for step in count(start_step):
            for micro in range(micro_batches):
                first = step * batch_size + (rank * micro_batches + micro) * share
                yield [slot(dataset, seed, number) for number in range(first, first + share)]

    return TrainBatches(_load(dataset, plan(), seed, workers), micro_batches)


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

    return (item.batch for item in _load(dataset, plan(), 0, workers))


def slot(dataset: PictureDataset, seed: int, number: int) -> Slot:
    """The sample that is the run's `number`-th."""
    epoch, place = divmod(number, len(dataset))
    return epoch, int(dataset.order(seed, epoch)[place])


def substitute(seed: int, epoch: int, index: int, attempt: int, length: int) -> int:
    """What is tried in place of the bad sample `index`: a pure function, the same on every process."""
    return int(uniforms(seed, epoch, f"substitute/{index}/{attempt}", 1)[0] * length)


def _load(
    dataset: PictureDataset, plan: Iterator[Sequence[Slot]], seed: int, workers: int
) -> Iterator[_Loaded]:
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


def _fetch(dataset: PictureDataset, slots: Sequence[Slot], seed: int) -> _Loaded:
    try:
        return _Loaded(dataset.batch([index for _, index in slots], [epoch for epoch, _ in slots], seed=seed))
    except BadSample:
        if not dataset.skip_budget or any(epoch < 0 for epoch, _ in slots):
            raise
    skipped: Counter[str] = Counter()
    samples = [_readable(dataset, epoch, index, seed, skipped) for epoch, index in slots]
    return _Loaded(collate(samples), skipped)


def _readable(
    dataset: PictureDataset, epoch: int, index: int, seed: int, skipped: Counter[str]
) -> dict[str, Any]:
    """The sample, or the first readable one of its substitutes; counts it where it is bad."""
    try:
        return dataset.sample(index, epoch, seed=seed)
    except BadSample as error:
        skipped[error.reason] += 1
        first = error
    for attempt in range(SUBSTITUTES):
        other = substitute(seed, epoch, index, attempt, len(dataset))
        try:
            return dataset.sample(other, epoch, seed=seed)
        except BadSample:
            continue
    raise DataError(f"{SUBSTITUTES} samples in place of a bad one are bad too, the first of them: {first}")


class _Slots(Dataset[Any]):
    """The dataset as torch sees it: its "index" is a whole batch of slots."""

    def __init__(self, dataset: PictureDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, slots: Sequence[Slot]) -> _Loaded | str:
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


def _unwrap(loader: DataLoader[Any]) -> Iterator[_Loaded]:
    for item in loader:
        if isinstance(item, str):
            raise DataError(item)
        yield item
