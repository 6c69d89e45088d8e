"""Where the files of a pack lie, and how any part of them is read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from taming.data.config import ShardsDataConfig
from taming.data.shards.index import INDEX, LARGEST_INDEX, ShardFacts, ShardIndex, parse_index
from taming.data.shards.remote import FileCache, fetch, is_address, join_address, shown
from taming.errors import BadSample, DataError
from taming.units import format_bytes

T = TypeVar("T")
_FILES_OPEN = 32
_ATTEMPTS = 3


class Store(Protocol):
    """Where the files of a pack lie."""

    name: str
    """As users know it."""

    def index(self) -> ShardIndex: ...

    def entries(self, shard: ShardFacts) -> bytes: ...

    def path(self, shard: ShardFacts) -> Path:
        """The shard as a file here; it may have to be fetched."""

    def lengths(self, shards: Sequence[ShardFacts]) -> list[int | None]:
        """Bytes of each shard; None where it is missing. Raises DataError where they cannot be kept here."""


class LocalStore:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def index(self) -> ShardIndex:
        return read_index(self.folder)

    def entries(self, shard: ShardFacts) -> bytes:
        path = self.folder / shard.entries
        try:
            if path.stat().st_size > shard.entries_size:
                raise DataError(f"{path} holds other bytes than {INDEX} says; get it again")
            return path.read_bytes()
        except FileNotFoundError:
            raise BadSample(
                f"{self.folder / INDEX} names {shard.entries}, which is not there; get it", "missing"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}; get it again") from None

    def path(self, shard: ShardFacts) -> Path:
        return self.folder / shard.file

    def lengths(self, shards: Sequence[ShardFacts]) -> list[int | None]:
        return [_length(self.path(shard)) for shard in shards]


class RemoteStore:
    """An http or https address; files are kept in a cache."""

    def __init__(self, root: str, cache: FileCache, shuffle_shards: int) -> None:
        self.root, self.cache, self.name = root, cache, shown(root)
        self.shuffle_shards = shuffle_shards

    def index(self) -> ShardIndex:
        address = join_address(self.root, INDEX)
        return parse_index(fetch(address, limit=LARGEST_INDEX), shown(address))

    def entries(self, shard: ShardFacts) -> bytes:
        address = join_address(self.root, shard.entries)
        return _read_again(
            partial(self.cache.get, address, shard.entries_size, shard.entries_sha256), Path.read_bytes
        )

    def path(self, shard: ShardFacts) -> Path:
        return self.cache.get(join_address(self.root, shard.file), shard.size, shard.sha256)

    def lengths(self, shards: Sequence[ShardFacts]) -> list[int | None]:
        if not self.holds(shards, self.shuffle_shards):
            at_once = min(len(shards), self.shuffle_shards)
            raise DataError(
                f"data.cache_size {format_bytes(self.cache.size)} is less than the"
                f" {format_bytes(_largest(shards, at_once))} of {at_once} shards that are mixed at a"
                " time; raise it or lower data.shuffle_shards"
            )
        return [shard.size for shard in shards]

    def holds(self, shards: Sequence[ShardFacts], at_once: int) -> bool:
        """Whether the cache has room for any so many shards."""
        return _largest(shards, at_once) <= self.cache.size


def open_store(config: ShardsDataConfig) -> Store:
    """Where a config's shards lie."""
    if not is_address(config.root):
        return LocalStore(Path(config.root).expanduser())
    folder = config.cache or Path("~/.cache/taming/shards")
    return RemoteStore(config.root, FileCache(folder.expanduser(), config.cache_size), config.shuffle_shards)


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards. Raises DataError."""
    path = folder / INDEX
    try:
        if path.stat().st_size > LARGEST_INDEX:
            raise DataError(f"{path} has more than {format_bytes(LARGEST_INDEX)}; it is no index of shards")
        return parse_index(path.read_bytes(), str(path))
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise DataError(
            f"{path} {what}; make shards with `taming data pack`, or of tars that others made with"
            " `taming data index`"
        ) from None


class OpenFiles:
    """Reads files at any place; keeps some open, for each thread of each process its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._local = threading.local()

    def read(self, find: Callable[[], Path], name: str, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset` of the file that is known as `name`; `find` gives its path.

        Raises OSError.
        """
        file = self._open(find, name)
        parts: list[bytes] = []
        try:
            while size > 0 and (part := os.pread(file.fileno(), size, offset)):
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
        except OSError:
            # A handle may have become stale for good, where the file has not.
            self._local.files.pop(name).close()
            raise
        return b"".join(parts)

    def _open(self, find: Callable[[], Path], name: str) -> BinaryIO:
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.pid, self._local.files = os.getpid(), OrderedDict()
        files: OrderedDict[str, BinaryIO] = self._local.files
        if name in files:
            files.move_to_end(name)
            return files[name]
        files[name] = _read_again(find, _open)
        while len(files) > _FILES_OPEN:
            files.popitem(last=False)[1].close()
        return files[name]


def _read_again(find: Callable[[], Path], read: Callable[[Path], T]) -> T:
    """Read a file that others may remove from a cache in the moment after it was found. Raises OSError."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return read(find())
        except FileNotFoundError:
            continue
    return read(find())


def _largest(shards: Sequence[ShardFacts], count: int) -> int:
    """Bytes of the `count` largest shards, and of the entries of all."""
    return sum(sorted(shard.size for shard in shards)[-count:]) + sum(shard.entries_size for shard in shards)


def _length(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _open(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)
