"""Tars of samples: written so that equal data gives equal bytes, and read so that no damage is passed over.

The layout is webdataset's: the files of a sample follow each other and share a key, which ends at the first
dot of the last part of a name.

    KEY.jpg                a picture, or an array (.npy); any suffix of taming.data.picture
    KEY.segmentation.png   its maps and second picture; KEY.depth.png, KEY.condition.png
    KEY.cls                the label, a whole number
    KEY.txt                captions, one a line
    KEY.json               {"objects": [{"label", "box"}]}

Dots of a key itself are written %2E, and % is %25. Names of members are never used as paths.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from taming.data.channels import ARRAY_SUFFIX
from taming.data.picture import SUFFIXES
from taming.data.shards.index import Kind
from taming.errors import BadSample

BLOCK = tarfile.BLOCKSIZE
_LARGEST_NAME = 2**16
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE)
_PICTURES = SUFFIXES | {ARRAY_SUFFIX}
_MAPS: dict[Kind, str] = {"segmentation": "segmentation", "depth": "depth", "condition_image": "condition"}
_PLAIN: dict[Kind, str] = {"label": "cls", "text": "txt", "objects": "json"}
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """One file of a tar."""

    name: str
    offset: int
    """Where its bytes begin."""
    size: int


class TarWriter:
    """webdataset's writer, of tars that hold nothing of this machine or moment; hashed on the way.

    It says where each file lies, and the disk holds all of it once the context ends.
    """

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter as Writer

        self._file = path.open("wb")
        self._digest, self._written = hashlib.sha256(), 0
        self._tar = Writer(self, user="", group="", mtime=0, encoder=False)

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closed after an error too, which is then the one that counts.
        with self._file, nullcontext() if kind is None else suppress(OSError):
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes so far."""
        # What is added waits in a buffer; what ends the tar is only known once it is written.
        return max(self._tar.tarstream.offset, self._written)

    @property
    def sha256(self) -> str:
        """Of the whole tar, once the context has ended."""
        return self._digest.hexdigest()

    def add(self, key: str, extension: str, data: bytes) -> Member:
        """A file of the sample `key`. Raises OSError."""
        self._tar.write({"__key__": member_key(key), extension: data})
        return Member(member_name(key, extension), self.size - -(-len(data) // BLOCK) * BLOCK, len(data))

    def write(self, data: bytes) -> int:
        """For webdataset, whose file this is."""
        self._digest.update(data)
        self._written += len(data)
        return self._file.write(data)


def read_members(file: BinaryIO, source: str) -> Iterator[Member]:
    """Every file of a tar, from its headers; `file` may be moved in between.

    Raises BadSample where a header is damaged, the end is missing or something follows it, and for links,
    devices and sparse files: readers of tars take a damaged header for the end, and the rest is lost unseen.
    """
    end = file.seek(0, io.SEEK_END)
    place, name = 0, None
    while True:
        file.seek(place)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BadSample(
                f"shard {source} is cut off: it ends without an end mark; get it again", "truncated"
            )
        if not any(header):
            _check_end(file, source, place)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise _damaged(source, place, str(error)) from None
        start, place = place + BLOCK, place + BLOCK + -(-info.size // BLOCK) * BLOCK
        if info.size < 0:
            raise _damaged(source, start - BLOCK, "negative size")
        if start + info.size > end:
            raise BadSample(
                f"shard {source} is cut off: it has {end} bytes, and {info.name!r} ends at"
                f" {start + info.size}; get it again",
                "truncated",
            )
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if info.size > _LARGEST_NAME:
                raise _damaged(source, start - BLOCK, f"a name of {info.size} bytes")
            told = file.read(info.size)
            if info.type == tarfile.XHDTYPE:
                name = _pax_path(told, source, start) or name
            else:
                name = told.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XGLTYPE:
            continue
        elif info.type in _FILES:
            yield Member(name or info.name, start, info.size)
            name = None
        elif info.type == tarfile.DIRTYPE:
            name = None
        else:
            raise BadSample(
                f"shard {source} holds {name or info.name!r}, which is no file but a link, a device or"
                " the like; such tars are not read",
                "unreadable",
            )


def _check_end(file: BinaryIO, source: str, place: int) -> None:
    """An end is two empty blocks, and nothing comes after."""
    file.seek(place)
    length = 0
    while chunk := file.read(2**20):
        length += len(chunk)
        if chunk.count(0) < len(chunk):
            raise BadSample(
                f"shard {source} is damaged: data follows its end mark at byte {place}; get it again",
                "unreadable",
            )
    if length < 2 * BLOCK:
        raise BadSample(f"shard {source} is cut off in its end mark; get it again", "truncated")


def _pax_path(data: bytes, source: str, place: int) -> str | None:
    """The path that an extended header gives, "LENGTH KEY=VALUE\\n" each (POSIX.1-2001, pax)."""
    path, at = None, 0
    while at < len(data.rstrip(b"\0")):
        found = _RECORD.match(data, at)
        length = int(found[1]) if found else 0
        if found is None or length <= found.end() - at or data[at + length - 1 : at + length] != b"\n":
            raise _damaged(source, place, "malformed extended header")
        if found[2] == b"path":
            path = data[found.end() : at + length - 1].decode("utf-8", "surrogateescape")
        if found[2] == b"size" or found[2].startswith(b"GNU.sparse"):
            raise _damaged(source, place, f"{found[2].decode(errors='replace')} in an extended header")
        at += length
    return path


def _damaged(source: str, place: int, what: str) -> BadSample:
    return BadSample(
        f"shard {source} has a damaged header at byte {place} ({what}): what follows cannot be found; get it"
        " again",
        "unreadable",
    )


def extension_of(kind: Kind, suffix: str = "") -> str:
    """What follows the key in the name of a member; `suffix` is that of a picture or map."""
    if kind == "image":
        return suffix.removeprefix(".")
    return _PLAIN[kind] if kind in _PLAIN else _MAPS[kind] + suffix


def kind_of(extension: str) -> Kind | None:
    """What a member with this extension is; None for what this toolkit does not read."""
    for kind, plain in _PLAIN.items():
        if extension == plain:
            return kind
    name, _, suffix = extension.rpartition(".")
    if f".{suffix}" not in _PICTURES:
        return None
    return "image" if not name else next((kind for kind, word in _MAPS.items() if word == name), None)


def member_key(key: str) -> str:
    """The key of a sample as tars spell it: before the first dot of a name."""
    return key.replace("%", "%25").replace(".", "%2E")


def member_name(key: str, extension: str) -> str:
    """The name in a tar of a sample's file: its key, and what comes after the first dot."""
    return f"{member_key(key)}.{extension}"


def key_of_member(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member's name as webdataset splits it; None where there is none of either."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    base, _, extension = last.partition(".")
    if not base or not extension:
        return None
    key = folder + slash + base
    return key.replace("%2E", ".").replace("%25", "%"), extension.lower()


def objects_json(objects: Sequence[Any]) -> bytes:
    """The member KEY.json of a sample's objects (see taming.data.scenes.SceneObject)."""
    return json.dumps({"objects": objects}).encode()


def parse_objects(data: bytes, num_classes: int | None) -> list[Any]:
    """Objects of a member KEY.json, their boxes in [0, 1]. Raises ValueError."""
    try:
        document = json.loads(data)
        listed = [(item["label"], [float(x) for x in item["box"]]) for item in document["objects"]]
    except (KeyError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f'it is not {{"objects": [{{"label", "box"}}]}} ({type(error).__name__})') from None
    for label, box in listed:
        known = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        if not known or (num_classes is not None and label >= num_classes):
            raise ValueError(f"label {label!r} of an object is none of {num_classes or 'any'} classes")
        if len(box) != 4 or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError(f"box {box} is not x0 < x1, y0 < y1 in [0, 1]")
    return [{"label": label, "box": tuple(box)} for label, box in listed]
