"""What an index says of shards, and where each sample lies in them: the format of a pack.

    DIR/index.json                           ShardIndex, with the sizes and hashes of all other files
    DIR/pictures-000000.tar                  samples in webdataset's layout (taming.data.shards.tar)
    DIR/pictures-000000.entries.safetensors  Entries: of each sample its key, label and size, and of each of
                                             its files the place, length and crc32 in the shard

Keys and names of files are told by strangers: both are checked, and keys never become paths of what is read.

n samples, one row each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load, save

from taming.config import Config, build_config
from taming.errors import ConfigError, DataError

FORMAT = "taming-shards/1"
INDEX = "index.json"
ENTRIES_SUFFIX = ".entries.safetensors"
Kind = Literal["image", "segmentation", "depth", "condition_image", "label", "objects", "text"]
KINDS: tuple[Kind, ...] = ("image", "segmentation", "depth", "condition_image", "label", "objects", "text")
LARGEST_MEMBER = 2**30
"""Bytes of a file in a shard: it is read whole."""
LARGEST_INDEX = 2**28
"""Bytes."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_COLUMNS: dict[str, type[np.generic]] = {
    "offset": np.int64,
    "size": np.uint32,
    "crc32": np.uint32,
    "suffix": np.uint8,
}


def _file_name(name: str) -> str:
    if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"} or len(name.encode()) > 255:
        raise ValueError(f"{name!r} is not the plain name of a file beside the index")
    return name


Name = Annotated[str, AfterValidator(_file_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardFacts(Config):
    """One shard."""

    file: Name
    count: int = Field(ge=1)
    """Its samples."""
    size: int = Field(ge=1)
    """Bytes."""
    sha256: Sha256
    entries: Name
    """The file of its Entries."""
    entries_size: int = Field(ge=1)
    entries_sha256: Sha256

    @model_validator(mode="after")
    def _check(self) -> ShardFacts:
        # What is said of a file takes less room than the file and its header.
        if self.entries_size > self.size + 2**16:
            raise ValueError(f"its {self.entries_size} bytes of entries are more than the shard has")
        return self


class ShardIndex(Config):
    """All shards, and what every sample holds."""

    format: Literal["taming-shards/1"] = "taming-shards/1"
    count: int = Field(ge=1)
    fields: list[Kind]
    """What each sample has, in the order of KINDS."""
    class_names: list[str] = Field(default_factory=list)
    """Names of the labels 0, 1, ..."""
    num_labels: int | None = Field(None, ge=1)
    """Of segmentation: the maps hold labels in [0, num_labels)."""
    object_names: list[str] = Field(default_factory=list)
    """Names of the objects' labels 0, 1, ..."""
    shards: list[ShardFacts] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> ShardIndex:
        if sum(shard.count for shard in self.shards) != self.count:
            raise ValueError(f"its shards do not hold the {self.count} samples that it counts")
        files = [name for shard in self.shards for name in (shard.file, shard.entries)]
        if len(set(files)) < len(files):
            raise ValueError("it names a file twice")
        if "image" not in self.fields or self.fields != [kind for kind in KINDS if kind in self.fields]:
            raise ValueError(f"its fields {self.fields} are not image and others of {', '.join(KINDS)}")
        told = {"segmentation": self.num_labels, "label": self.class_names, "objects": self.object_names}
        for kind, value in told.items():
            if kind in self.fields and not value:
                raise ValueError(f"it does not say which labels its {kind} has")
        return self

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def parse_index(data: bytes, source: str) -> ShardIndex:
    """Raises DataError."""
    try:
        if len(data) > LARGEST_INDEX:
            raise ValueError(f"it has more than {LARGEST_INDEX} bytes")
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} cannot be read as JSON: {error}; get it again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise DataError(
            f"{source} is no index of the format {FORMAT}; make one with `taming data pack`, or of tars"
            " that others made with `taming data index`"
        )
    try:
        return build_config(ShardIndex, values, source=source)
    except ConfigError as error:
        raise DataError(f"{error}; get it again") from None


@dataclass(frozen=True)
class Places:
    """Where one kind of file lies in a shard: arrays (n,)."""

    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    suffix: np.ndarray
    """Index into Entries.suffixes."""


@dataclass(frozen=True)
class Entries:
    """The samples of one shard."""

    keys: bytes
    """All keys in UTF-8, without anything between them."""
    key_ends: np.ndarray
    """(n,) int64: where each key ends."""
    sizes: np.ndarray
    """(n, 2) int32: height and width of the upright picture."""
    places: dict[Kind, Places]
    suffixes: list[str]
    """".jpg" and others that the files have."""
    labels: np.ndarray | None = None
    """(n,) int64."""
    captions: bytes = field(default=b"", repr=False)
    """All texts in UTF-8, so that they can be read without the shard."""
    caption_ends: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.key_ends)

    def key(self, row: int) -> str:
        return piece(self.keys, self.key_ends, row).decode()

    def caption(self, row: int) -> str:
        assert self.caption_ends is not None
        return piece(self.captions, self.caption_ends, row).decode()

    def to_bytes(self) -> bytes:
        tensors: dict[str, np.ndarray] = {
            "keys": np.frombuffer(self.keys, np.uint8),
            "key_ends": self.key_ends.astype(np.int64),
            "sizes": self.sizes.astype(np.int32),
        }
        for kind, places in self.places.items():
            for name, dtype in _COLUMNS.items():
                tensors[f"{kind}/{name}"] = getattr(places, name).astype(dtype)
        if self.labels is not None:
            tensors["labels"] = self.labels.astype(np.int64)
        if self.caption_ends is not None:
            tensors["captions"] = np.frombuffer(self.captions, np.uint8)
            tensors["caption_ends"] = self.caption_ends.astype(np.int64)
        # One text: the library writes several in an order that differs from run to run.
        return save(tensors, {"suffixes": json.dumps(self.suffixes)})


def parse_entries(
    data: bytes, shard: ShardFacts, index: ShardIndex, source: str, *, fields: Sequence[Kind] | None = None
) -> Entries:
    """Entries that lie within their shard, of the index's fields or of some. Raises DataError."""
    try:
        tensors, suffixes = load(data), _suffixes(data)
        entries = _entries(tensors, suffixes, index.fields if fields is None else fields)
        _check_entries(entries, shard, index)
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{source} does not describe the shard {shard.file}: {what}; get it again") from None
    return entries


def _suffixes(data: bytes) -> list[str]:
    length = int.from_bytes(data[:8], "little")
    suffixes = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["suffixes"])
    if not isinstance(suffixes, list) or not all(isinstance(suffix, str) for suffix in suffixes):
        raise ValueError("its suffixes are no list of names")
    return suffixes


def _entries(tensors: dict[str, np.ndarray], suffixes: list[str], fields: Sequence[Kind]) -> Entries:
    def column(name: str, dtype: type[np.generic]) -> np.ndarray:
        if tensors[name].dtype != dtype:
            raise ValueError(f"{name} is {tensors[name].dtype}, not {np.dtype(dtype)}")
        return tensors[name]

    places: dict[Kind, Places] = {
        kind: Places(**{name: column(f"{kind}/{name}", dtype) for name, dtype in _COLUMNS.items()})
        for kind in fields
        if kind != "label"
    }
    told = "text" in fields
    return Entries(
        keys=column("keys", np.uint8).tobytes(),
        key_ends=column("key_ends", np.int64),
        sizes=column("sizes", np.int32),
        places=places,
        suffixes=suffixes,
        labels=column("labels", np.int64) if "label" in fields else None,
        captions=column("captions", np.uint8).tobytes() if told else b"",
        caption_ends=column("caption_ends", np.int64) if told else None,
    )


def _check_entries(entries: Entries, shard: ShardFacts, index: ShardIndex) -> None:
    """Raises ValueError."""
    count = shard.count
    columns: dict[str, np.ndarray] = {"key_ends": entries.key_ends}
    for kind, places in entries.places.items():
        columns |= {f"{kind}/{name}": value for name, value in vars(places).items()}
    if entries.labels is not None:
        columns["labels"] = entries.labels
    for name, value in columns.items():
        if value.shape != (count,):
            raise ValueError(f"{name} is {value.shape}, not ({count},)")
    if entries.sizes.shape != (count, 2) or entries.sizes.min() < 1:
        raise ValueError("its sizes are not those of pictures")
    _check_texts(entries.keys, entries.key_ends, "keys")
    check_keys(entries.keys, entries.key_ends)
    if entries.caption_ends is not None:
        if entries.caption_ends.shape != (count,):
            raise ValueError(f"caption_ends is {entries.caption_ends.shape}, not ({count},)")
        _check_texts(entries.captions, entries.caption_ends, "captions")
    for kind, places in entries.places.items():
        inside = (places.offset >= 0) & (places.offset <= shard.size - places.size.astype(np.int64))
        if not inside.all():
            raise ValueError(f"it places {kind} outside of the shard")
        if places.size.max() > LARGEST_MEMBER or places.suffix.max() >= len(entries.suffixes):
            raise ValueError(f"it places {kind} wrongly")
    if entries.labels is not None and not _within(entries.labels, len(index.class_names)):
        raise ValueError(f"its labels lie outside of the index's {len(index.class_names)} classes")


def _check_texts(data: bytes, ends: np.ndarray, what: str) -> None:
    """Raises ValueError."""
    inside = (ends > 0) & (ends <= len(data))
    if ends[-1] != len(data) or not inside.all() or (np.diff(ends) <= 0).any():
        raise ValueError(f"its {what} do not end where it says")
    data.decode()
    if (_firsts(data, ends) & 0xC0 == 0x80).any():
        raise ValueError(f"its {what} begin within a character")


def _firsts(data: bytes, ends: np.ndarray) -> np.ndarray:
    """The first byte of each of the parts that were joined."""
    return np.frombuffer(data, np.uint8)[np.concatenate([[0], ends[:-1]])]


def _within(values: np.ndarray, count: int) -> bool:
    return bool(values.min() >= 0 and values.max() < count)


def check_keys(keys: bytes, ends: np.ndarray) -> None:
    """Raises ValueError for a key that would leave a folder if it became a path, as in results' names."""
    # Most shards have no dots in keys: there only slashes can be wrong.
    slashes = (_firsts(keys, ends) == ord("/")) | (np.frombuffer(keys, np.uint8)[ends - 1] == ord("/"))
    if b"." not in keys and b"//" not in keys and not slashes.any() and not _CONTROL.search(keys.decode()):
        return
    for row in range(len(ends)):
        check_key(piece(keys, ends, row).decode())


def check_key(key: str) -> str:
    """The key itself. Raises ValueError as `check_keys`."""
    if not key or _CONTROL.search(key) or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"key {key!r} is no relative path without backslashes, . and ..")
    return key


def piece(data: bytes, ends: np.ndarray, row: int) -> bytes:
    """Number `row` of what was joined."""
    return data[int(ends[row - 1]) if row else 0 : int(ends[row])]


def joined(parts: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    """Parts in one, and where each ends."""
    return b"".join(parts), np.cumsum([len(part) for part in parts], dtype=np.int64)
