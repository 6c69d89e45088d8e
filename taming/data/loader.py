"""Batches in an order that is a pure function of (seed, step), however many processes share it.

Sample number g of a run (step * batch_size + position in the batch) is entry g % n of the shuffled order
of epoch g // n. Each rank takes its slice of every global batch, so that 1, 2 or 4 processes see the same
batches, and resuming at a step is arithmetic.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from taming.data.ahead import Ahead
from taming.data.batch import collate
from taming.data.dataset import PictureDataset
from taming.data.patience import patiently
from taming.data.transforms import uniforms
from taming.data.workers import Workers
from taming.errors import BadSample, ConfigError, DataError, DataWarning
from taming.types import Batch

Slot = tuple[int, int]
"""(epoch, index): a sample and the epoch that decides its augmentation; epoch -1 means none."""

SUBSTITUTES = 32
"""So many others are tried in place of a sample that is bad."""


@dataclass(frozen=True)
class _Loaded:
    """Samples in a batch, and what was bad among those that were asked for."""

    batch: Batch | None
    """None where no sample is left."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> how many."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> what was wrong with the first."""

    def pin_memory(self) -> _Loaded:
        """In memory that a GPU copies from while the host goes on."""
        if self.batch is None:
            return self
        batch = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self.batch.items()
        }
        return replace(self, batch=batch)


class TrainBatches(Iterator[list[Batch]]):
    """Endless: the micro-batches of one step after another."""

    def __init__(self, loaded: Iterator[_Loaded], micro_batches: int) -> None:
        self._loaded, self._micro_batches = loaded, micro_batches
        self._skipped: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        """Reason -> what was wrong with the first sample that was bad for it."""

    def __next__(self) -> list[Batch]:
        batches = []
        for _ in range(self._micro_batches):
            loaded = next(self._loaded)
            assert loaded.batch is not None  # in training, others take the places of bad samples
            self._skipped += loaded.skipped
            self.examples = {**loaded.examples, **self.examples}
            batches.append(loaded.batch)
        return batches

    def take_skipped(self) -> Counter[str]:
        """Reason -> bad samples that were replaced in what was handed out since the last call."""
        taken, self._skipped = self._skipped, Counter()
        return taken

    def close(self) -> None:
        """End what reads ahead; it ends with this object, too."""
        if isinstance(self._loaded, Workers | Ahead):
            self._loaded.close()


class EvaluationBatches(Iterator[Batch]):
    """Samples once each, without the bad ones, which `skipped` counts; too many of them raise DataError."""

    def __init__(self, loaded: Iterator[_Loaded], total: int, budget: float) -> None:
        self._loaded, self._total, self._budget = loaded, total, budget
        self.skipped: Counter[str] = Counter()
        """Reason -> bad samples that were left out so far."""
        self.examples: dict[str, str] = {}
        """Reason -> what was wrong with the first of them."""

    def __next__(self) -> Batch:
        for loaded in self._loaded:
            if loaded.skipped:
                self._count(loaded)
            if loaded.batch is not None:
                return loaded.batch
        raise StopIteration

    def _count(self, loaded: _Loaded) -> None:
        before, known = self.skipped.total(), set(self.skipped)
        self.skipped += loaded.skipped
        self.examples = {**loaded.examples, **self.examples}
        # One may always be bad: a budget of 0.1 % would else be none for fewer than 1000 samples.
        if self.skipped.total() > max(1.0, self._budget * self._total):
            raise DataError(
                f"{self._told()}: more of the {self._total} samples to evaluate on than data.skip_budget ="
                f" {self._budget:g} allows; find them with `taming data check`, mend or remove them, or raise"
                " data.skip_budget"
            )
        # Whoever evaluates may ask for none of the counts: each new reason is told, and then 10, 100, 1000.
        if set(self.skipped) - known or len(str(self.skipped.total())) > len(str(before)):
            warnings.warn(f"left out of the evaluation so far: {self._told()}", DataWarning, stacklevel=3)

    def _told(self) -> str:
        return "; ".join(
            f"{number} {reason} (first: {self.examples[reason]})"
            for reason, number in sorted(self.skipped.items())
        )


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

    loaded = _load(dataset, plan(), seed, workers, rank)
    # Training never waits where the next batches can be made while it works.
    return TrainBatches(loaded if workers else Ahead(loaded), micro_batches)


def evaluation_batches(
    dataset: PictureDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    workers: int = 0,
) -> EvaluationBatches:
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

    workers = min(workers, -(-len(indices) // share))
    return EvaluationBatches(_load(dataset, plan(), 0, workers, rank), total, dataset.skip_budget)


def slot(dataset: PictureDataset, seed: int, number: int) -> Slot:
    """The sample that is the run's `number`-th."""
    epoch, place = divmod(number, len(dataset))
    return epoch, int(dataset.order(seed, epoch)[place])


def substitute(seed: int, epoch: int, index: int, attempt: int, length: int) -> int:
    """What is tried in place of the bad sample `index`: a pure function, the same on every process."""
    return int(uniforms(seed, epoch, f"substitute/{index}/{attempt}", 1)[0] * length)


def _load(
    dataset: PictureDataset, plan: Iterator[Sequence[Slot]], seed: int, workers: int, rank: int
) -> Iterator[_Loaded]:
    fetch = partial(_fetch, dataset, seed)
    pin = torch.cuda.is_available() and torch.cuda.is_initialized()
    if workers:
        patience = dataset.patience_seconds
        return Workers(fetch, plan, workers=workers, rank=rank, pin=pin, patience=patience)
    loaded = map(fetch, plan)
    return map(_Loaded.pin_memory, loaded) if pin else loaded


def _fetch(dataset: PictureDataset, seed: int, slots: Sequence[Slot]) -> _Loaded:
    try:
        return _Loaded(dataset.batch([index for _, index in slots], [epoch for epoch, _ in slots], seed=seed))
    except BadSample:
        pass  # sample by sample, then
    skipped: Counter[str] = Counter()
    examples: dict[str, str] = {}
    samples = []
    for epoch, index in slots:
        try:
            samples.append(patiently(partial(dataset.sample, index, epoch, seed=seed)))
        except BadSample as error:
            if not dataset.skip_budget:
                raise
            skipped[error.reason] += 1
            examples.setdefault(error.reason, str(error))
            if epoch >= 0:
                samples.append(_other(dataset, seed, epoch, index, error))
    return _Loaded(collate(samples) if samples else None, skipped, examples)


def _other(dataset: PictureDataset, seed: int, epoch: int, index: int, first: BadSample) -> dict[str, Any]:
    """The first readable one of the substitutes of a bad sample."""
    for attempt in range(SUBSTITUTES):
        other = substitute(seed, epoch, index, attempt, len(dataset))
        try:
            return patiently(partial(dataset.sample, other, epoch, seed=seed))
        except BadSample:
            continue
    raise DataError(f"{SUBSTITUTES} samples in place of a bad one are bad too, the first of them: {first}")
