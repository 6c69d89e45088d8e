"""Shards as a dataset: any sample is read by a few reads at known places, in any order, without extraction.

Opening reads the index and the entries of the shards alone.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from taming.data.checking.findings import in_threads
from taming.data.config import ShardsDataConfig
from taming.data.dataset import Split
from taming.data.left_out import LeftOut
from taming.data.order import epoch_order
from taming.data.picture import FileBytes
from taming.data.shards.ahead import FetchAhead
from taming.data.shards.index import INDEX, Entries, Kind, ShardFacts, ShardIndex, parse_entries
from taming.data.shards.store import OpenFiles, RemoteStore, open_store
from taming.data.shards.tar import extension_of, member_name, parse_objects
from taming.data.stored import MAP_KINDS, MapKind, Stored, StoredDataset, held_out
from taming.errors import BadSample, DataError

_THREADS = 8


class ShardDataset(StoredDataset):
    """Pictures of shards. Raises DataError for whatever is wrong with them, and says the way out."""

    def __init__(self, config: ShardsDataConfig, split: Split) -> None:
        self.config: ShardsDataConfig = config
        self.split = split
        self.size = config.height_width
        self.skip_budget = config.skip_budget
        self.store = open_store(config)
        self.index = self.store.index()
        self.fields = _fields(config, self.index, self.store.name)
        self.shards = self.index.shards
        self.entries = list(in_threads(self._read_entries, self.shards, _THREADS))
        starts = np.cumsum([0] + [shard.count for shard in self.shards])
        self._shard_of = np.repeat(np.arange(len(self.shards)), [shard.count for shard in self.shards])
        self._start_of = starts[:-1]
        self.rows = self._rows_of_split()
        left_out = LeftOut(self.store.name, self.index.count, config.skip_budget)
        self._leave_out_lost(left_out)
        self._leave_out_sizes(left_out)
        self.notes = left_out.notes()
        self.class_names = self.index.class_names if "label" in self.fields else []
        self.num_labels = config.num_labels or 0 if "segmentation" in self.fields else 0
        self.object_names = self.index.object_names if "objects" in self.fields else ()
        self.provides = frozenset({*self.fields, "crop", "key"})
        self._files = OpenFiles()
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._ahead: FetchAhead | None = None
        if isinstance(self.store, RemoteStore):
            # One batch may wait for a whole block of shards; a server that is silent is noticed before.
            self.patience_seconds = 3600.0
            self._ahead = FetchAhead(self.store, self.shards, self._blocks)

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, index: int) -> Stored:
        number, row, entries = self._place(index)
        key = entries.key(row)
        height, width = entries.sizes[row].tolist()
        maps: dict[MapKind, FileBytes] = {}
        for kind in MAP_KINDS:
            if kind in self.fields:
                maps[kind] = self._file(number, row, kind)
        objects = captions = None
        if "objects" in self.fields:
            source = self._file(number, row, "objects")
            try:
                objects = parse_objects(source.data, len(self.object_names))
            except ValueError as error:
                raise BadSample(f"objects {source} cannot be used: {error}", "mismatched") from None
        if "text" in self.fields:
            captions = entries.caption(row).split("\n")
        return Stored(
            key,
            (height, width),
            self._file(number, row, "image"),
            maps,
            None if entries.labels is None else int(entries.labels[row]),
            objects,
            captions,
        )

    def texts(self) -> Iterator[str]:
        if "text" in self.fields:
            for index in range(len(self)):
                _, row, entries = self._place(index)
                yield from entries.caption(row).split("\n")

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        if self._ahead is not None and epoch >= 0:
            self._ahead.reading(int(self._shard_of[self.rows[index]]), seed, epoch)
        return super().sample(index, epoch, seed=seed)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Blocks of `shuffle_shards` shards in a random order, their samples mixed; else as of a folder."""
        if len(self.shards) <= self.config.shuffle_shards:
            return epoch_order(seed, epoch, len(self))
        order = self._orders.get((seed, epoch))
        if order is None:
            keys = _random(seed, epoch).random(len(self.shards) + len(self))[len(self.shards) :]
            order = np.lexsort((keys, self._blocks(seed, epoch)[self._shard_of[self.rows]]))
            # A new dict, since threads may ask for several at once.
            newest = list(self._orders.items())[-1:]
            self._orders = {**dict(newest), (seed, epoch): order}
        return order

    def _blocks(self, seed: int, epoch: int) -> np.ndarray:
        """(number of shards,): the block in which an epoch takes each shard."""
        places = np.argsort(_random(seed, epoch).random(len(self.shards)), kind="stable")
        return np.argsort(places, kind="stable") // self.config.shuffle_shards

    def fingerprint(self) -> str:
        """sha256 over the hashes in the index, what is read of it, and which samples are the split's."""
        digest = hashlib.sha256("\n".join(self.fields).encode())
        for shard in self.shards:
            digest.update(f"{shard.sha256}/{shard.entries_sha256}/{shard.count}\n".encode())
        digest.update("\n".join([*self.class_names, *self.object_names]).encode())
        digest.update(self.rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def _place(self, index: int) -> tuple[int, int, Entries]:
        """(number of the shard, row in it, its entries)."""
        row = int(self.rows[index])
        number = int(self._shard_of[row])
        return number, row - int(self._start_of[number]), self.entries[number]

    def _file(self, number: int, row: int, kind: Kind) -> FileBytes:
        """A file of a sample. Raises BadSample where it is not what the index says."""
        shard, entries = self.shards[number], self.entries[number]
        places = entries.places[kind]
        suffix = entries.suffixes[places.suffix[row]]
        name = f"{self.store.name}/{shard.file}:{member_name(entries.key(row), extension_of(kind, suffix))}"
        offset, size = int(places.offset[row]), int(places.size[row])
        try:
            data = self._files.read(partial(self.store.path, shard), shard.sha256, offset, size)
        except FileNotFoundError:
            raise BadSample(f"{name} is gone with its shard; get the shard again", "missing") from None
        except OSError as error:
            raise BadSample(f"{name} cannot be read: {error}; get the shard again", "unreadable") from None
        if len(data) < size:
            raise BadSample(f"{name} is cut off with its shard; get the shard again", "truncated")
        if zlib.crc32(data) != places.crc32[row]:
            raise BadSample(f"{name} holds other bytes than the index says; get the shard again", "checksum")
        return FileBytes(name, data)

    def _read_entries(self, shard: ShardFacts) -> Entries:
        source = f"{self.store.name}/{shard.entries}"
        data = self.store.entries(shard)
        if len(data) != shard.entries_size or hashlib.sha256(data).hexdigest() != shard.entries_sha256:
            raise DataError(f"{source} holds other bytes than {INDEX} says; get it again")
        return parse_entries(data, shard, self.index, source, fields=self.fields)

    def _rows_of_split(self) -> np.ndarray:
        """(n,) int64: the numbers of the split's samples in the pack. Raises DataError for equal keys."""
        keys = [entries.key(row) for entries in self.entries for row in range(len(entries))]
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise DataError(f"{self.store.name} holds the key {twice!r} twice; rename one and pack again")
        apart = held_out(keys, self.config.validation_fraction)
        chosen = [row for row, key in enumerate(keys) if (key in apart) == (self.split == "validation")]
        return np.array(chosen, dtype=np.int64)

    def _leave_out_lost(self, left_out: LeftOut) -> None:
        """Samples of shards that are missing or cut off. Raises DataError."""
        ends = np.zeros(self.index.count, dtype=np.int64)
        lengths = np.zeros(len(self.shards), dtype=np.int64)
        for number, length in enumerate(self.store.lengths(self.shards)):
            shard, places = self.shards[number], self.entries[number].places
            first = self._start_of[number]
            for kind in self.fields:
                if kind in places:
                    end = places[kind].offset + places[kind].size
                    part = ends[first : first + shard.count]
                    np.maximum(part, end, out=part)
            lengths[number] = -1 if length is None else length
            if length is not None and length > shard.size:
                raise DataError(f"{self._told(number, length)}; get it again")
        missing = lengths[self._shard_of[self.rows]] < 0
        cut_off = ~missing & (lengths[self._shard_of[self.rows]] < ends[self.rows])
        for reason, lost in (("missing", missing), ("truncated", cut_off)):
            if lost.any():
                number = int(self._shard_of[self.rows[np.flatnonzero(lost)[0]]])
                first_told = self._told(number, None if reason == "missing" else int(lengths[number]))
                left_out.add(reason, int(lost.sum()), first_told)
        self.rows = self.rows[~missing & ~cut_off]

    def _told(self, number: int, length: int | None) -> str:
        shard = self.shards[number]
        if length is None:
            return f"shard {self.store.name}/{shard.file} is in the index and not there; get it"
        return f"shard {self.store.name}/{shard.file} has {length} bytes, not the {shard.size} of the index"

    def _leave_out_sizes(self, left_out: LeftOut) -> None:
        """Pictures that the config does not want. Raises DataError."""
        config, (height, width) = self.config, self.size
        sizes = np.concatenate([entries.sizes for entries in self.entries])[self.rows].astype(np.int64)
        small = (sizes < (height, width)).any(axis=1) & (not config.upscale)
        large = sizes.prod(axis=1) > config.max_pixels
        for reason, chosen, fault in (
            (
                "mismatched",
                small,
                f"smaller than the crop {width}x{height}; set data.upscale=true or "
                f"data.size={sizes[small].min(initial=min(height, width))}, or remove it",
            ),
            (
                "too large",
                large,
                f"more than data.max_pixels = {config.max_pixels}; raise that or remove it",
            ),
        ):
            if chosen.any():
                own_height, own_width = sizes[chosen][0].tolist()
                first = f"picture {self._name(chosen)} is {own_width}x{own_height}, {fault}"
                left_out.add(reason, int(chosen.sum()), first)
        self.rows = self.rows[~small & ~large]

    def _name(self, chosen: np.ndarray) -> str:
        """The first of the samples that are chosen by a mask."""
        number, row, entries = self._place(int(np.flatnonzero(chosen)[0]))
        return f"{self.store.name}/{self.shards[number].file}:{entries.key(row)}"


def _random(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)))


def _fields(config: ShardsDataConfig, index: ShardIndex, name: str) -> list[Kind]:
    """What is read of each sample. Raises DataError for what the shards do not hold."""
    wanted: dict[Kind, tuple[str, bool]] = {
        "image": ("", True),
        "segmentation": ("segmentation", config.segmentation),
        "depth": ("depth", config.depth),
        "condition_image": ("condition_image", config.condition_image),
        "label": ("class_labels", config.class_labels),
        "objects": ("objects", config.objects),
        "text": ("text", config.text),
    }
    for kind, (option, is_wanted) in wanted.items():
        if is_wanted and kind not in index.fields:
            raise DataError(
                f"data.{option} is set, but the shards in {name} hold {', '.join(index.fields)}; pack them"
                f" with {kind}, or set data.{option}=false"
            )
    if config.segmentation and (config.num_labels or 0) < (index.num_labels or 0):
        raise DataError(
            f"the maps in {name} hold {index.num_labels} labels, but data.num_labels is {config.num_labels};"
            f" set data.num_labels={index.num_labels}"
        )
    return [kind for kind, (_, is_wanted) in wanted.items() if is_wanted]
