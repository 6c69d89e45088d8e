"""An index for tars in webdataset's layout that others made: they become shards as they are."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from taming.atomic import write_text
from taming.data.channels import read_any_size
from taming.data.checking.findings import in_threads
from taming.data.folder import same_aspect
from taming.data.picture import MAX_PIXELS, FileBytes, read_labels
from taming.data.shards.index import INDEX, KINDS, LARGEST_MEMBER, Kind, ShardFacts, ShardIndex, check_key
from taming.data.shards.pack import EntriesMaker, Packed, Progress, write_entries
from taming.data.shards.tar import Member, key_of_member, kind_of, parse_objects, read_members
from taming.errors import BadSample, DataError
from taming.units import format_bytes

_LARGEST = {"label": 64, "text": 2**20, "objects": 2**24}
"""Bytes of members that are no pictures."""
_MOST_CLASSES = 10**6


def index_tars(
    folder: Path,
    *,
    fields: Sequence[Kind] | None = None,
    leave_out: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Read all tars of a folder in full and write their index and entries beside them.

    `fields` are what every sample must have and is kept of it, by default what the first sample has. With
    `leave_out` samples whose files are bad are left out, and `notes` counts them. Classes and labels of maps
    are as many as the largest number tells, their names the numbers. `progress` takes (shards done, all).
    Raises DataError for damaged tars, wrong keys and bad samples, naming the file and the reason; then
    nothing has been written.
    """
    if (folder / INDEX).exists():
        raise DataError(f"{folder / INDEX} is there already; remove it to index the tars again")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".tar") if folder.is_dir() else []
    if not paths:
        raise DataError(
            f"there are no files *.tar in {folder}; give the folder of the tars (unpack .tar.gz first:"
            " samples are read at their places)"
        )
    wanted = _in_order(fields) if fields is not None else _fields_of_first(paths[0])
    scan = _Scan(wanted, leave_out, max_pixels)
    scanned: list[Scanned] = []
    for result in in_threads(scan, paths, workers):
        scanned.append(result)
        if progress is not None:
            progress(len(scanned), len(paths))
    keys = Counter(key for one in scanned for key in one.made.keys)
    if not keys:
        raise DataError(f"no sample in {folder} can be used; {_notes(scanned)[0]}")
    twice, times = keys.most_common(1)[0]
    if times > 1:
        raise DataError(
            f"the tars in {folder} hold the key {twice.decode()!r} {times} times; keys must be unique"
        )
    try:
        shards = [_write_entries(folder, one) for one in scanned if len(one.made)]
        highest: Counter[Kind] = Counter()
        for one in scanned:
            highest |= one.highest
        index = ShardIndex(
            count=len(keys),
            fields=wanted,
            class_names=_numbers(highest["label"]) if "label" in wanted else [],
            num_labels=highest["segmentation"] if "segmentation" in wanted else None,
            object_names=_numbers(max(1, highest["objects"])) if "objects" in wanted else [],
            shards=shards,
        )
        write_text(folder / INDEX, index.to_bytes().decode())
    except OSError as error:
        raise DataError(f"the index of {folder} was not written ({error}); make room and try again") from None
    return Packed(index, _notes(scanned))


@dataclass
class Scanned:
    """What was found in one tar."""

    path: Path
    size: int = 0
    sha256: str = ""
    made: EntriesMaker = field(default_factory=EntriesMaker)
    highest: Counter[Kind] = field(default_factory=Counter)
    """Numbers that labels, maps and objects use, counted from 0."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Extensions of members that are not read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Reasons for samples that are left out."""
    first_left_out: str = ""


@dataclass(frozen=True)
class _Scan:
    fields: list[Kind]
    leave_out: bool
    max_pixels: int

    def __call__(self, path: Path) -> Scanned:
        """Raises DataError."""
        found = Scanned(path)
        try:
            with path.open("rb") as file:
                for key, members in _samples(file, str(path), found.ignored):
                    try:
                        self._add(file, key, members, found)
                    except BadSample as error:
                        if not self.leave_out:
                            raise
                        found.left_out[error.reason] += 1
                        found.first_left_out = found.first_left_out or str(error)
                file.seek(0)
                found.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                found.size = file.tell()
        except OSError as error:
            raise DataError(f"shard {path} cannot be read: {error}; get it again") from None
        return found

    def _add(self, file: BinaryIO, key: str, members: Sequence[_Named], found: Scanned) -> None:
        """Raises BadSample."""
        by_kind: dict[Kind, _Named] = {}
        for named in members:
            if named.kind not in self.fields:
                found.ignored[named.extension] += 1
            elif named.kind in by_kind:
                raise BadSample(
                    f"{found.path}:{key} has two files for {named.kind}, .{by_kind[named.kind].extension} and"
                    f" .{named.extension}; keep one",
                    "mismatched",
                )
            else:
                by_kind[named.kind] = named
        missing = [kind for kind in self.fields if kind not in by_kind]
        if missing:
            raise BadSample(
                f"{found.path}:{key} has no {missing[0]}, which other samples have; add it, leave such"
                " samples out with --leave-out, or name what all have with --fields",
                "missing",
            )
        data = {kind: _read(file, named, found.path) for kind, named in by_kind.items()}
        size = read_any_size(data["image"], max_pixels=self.max_pixels)
        highest = self._check(data, size)
        label = highest["label"] - 1 if "label" in highest else None
        caption = "\n".join(_captions(data["text"])).encode() if "text" in data else None
        found.made.add(key, size, label=label, caption=caption)
        found.highest |= highest
        for kind, named in by_kind.items():
            if kind != "label":
                suffix = f".{named.extension.rpartition('.')[2]}" if kind not in ("text", "objects") else ""
                found.made.place(kind, named.member, zlib.crc32(data[kind].data), suffix)

    def _check(self, data: dict[Kind, FileBytes], size: tuple[int, int]) -> Counter[Kind]:
        """How many labels each kind uses, counted from 0. Raises BadSample."""
        highest: Counter[Kind] = Counter()
        for kind, source in data.items():
            if kind in ("segmentation", "depth", "condition_image"):
                own = read_any_size(source, max_pixels=self.max_pixels)
                if not same_aspect(size, own):
                    raise BadSample(
                        f"map {source} is {own[1]}x{own[0]}, but its picture is {size[1]}x{size[0]}: the"
                        " aspects differ; make the map cover the same view",
                        "mismatched",
                    )
            match kind:
                case "segmentation":
                    labels = read_labels(source, max_pixels=self.max_pixels)
                    if labels.min() < 0:
                        raise BadSample(f"map {source} holds label {labels.min()}, below 0", "mismatched")
                    highest[kind] = int(labels.max()) + 1
                case "label":
                    text = source.data.strip()
                    if not (text.isdigit() and int(text) < _MOST_CLASSES):
                        raise BadSample(
                            f"{source} holds {text[:32]!r}; classes are numbers below {_MOST_CLASSES}",
                            "mismatched",
                        )
                    highest[kind] = int(text) + 1
                case "objects":
                    labels_found = [item["label"] for item in _objects(source)]
                    highest[kind] = max(labels_found, default=-1) + 1
        return highest


@dataclass(frozen=True)
class _Named:
    """A member that is understood."""

    member: Member
    extension: str
    kind: Kind


def _samples(file: BinaryIO, source: str, ignored: Counter[str]) -> Iterator[tuple[str, list[_Named]]]:
    """Each key of a tar with its members, which follow each other. Raises BadSample, DataError."""
    key: str | None = None
    members: list[_Named] = []
    for member in read_members(file, source):
        parts = key_of_member(member.name)
        kind = None if parts is None else kind_of(parts[1])
        if parts is None or kind is None:
            ignored[parts[1] if parts is not None else "(none)"] += 1
            continue
        if parts[0] != key:
            if key is not None:
                yield key, members
            key, members = _checked(parts[0], source), []
        members.append(_Named(member, parts[1], kind))
    if key is not None:
        yield key, members


def _checked(key: str, source: str) -> str:
    try:
        key.encode()
        return check_key(key)
    except ValueError as error:
        text = f"shard {source}: {error}; get it from somebody you trust, or make it again"
        raise DataError(text.encode(errors="replace").decode()) from None


def _read(file: BinaryIO, named: _Named, path: Path) -> FileBytes:
    limit = _LARGEST.get(named.kind, LARGEST_MEMBER)
    name = f"{path}:{named.member.name}".encode(errors="replace").decode()
    if named.member.size > limit:
        raise BadSample(
            f"{name} has {format_bytes(named.member.size)}, more than the {format_bytes(limit)} that are"
            " read; make it smaller",
            "too large",
        )
    file.seek(named.member.offset)
    return FileBytes(name, file.read(named.member.size))


def _captions(source: FileBytes) -> list[str]:
    """Raises BadSample."""
    try:
        lines = source.data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadSample(f"captions {source} are not UTF-8: {error}", "unreadable") from None
    told = [line.strip() for line in lines if line.strip()]
    if not told:
        raise BadSample(f"captions {source} are empty; write one, or leave out text with --fields", "missing")
    return told


def _objects(source: FileBytes) -> list[dict[str, int]]:
    """Raises BadSample."""
    try:
        return parse_objects(source.data, _MOST_CLASSES)
    except ValueError as error:
        raise BadSample(f"objects {source} cannot be used: {error}", "mismatched") from None


def _fields_of_first(path: Path) -> list[Kind]:
    """What the first sample of a tar has. A JSON counts where it lists objects. Raises DataError."""
    try:
        with path.open("rb") as file:
            for _, members in _samples(file, str(path), Counter()):
                kinds = {named.kind for named in members}
                for named in members:
                    if named.kind == "objects" and not _lists_objects(_read(file, named, path)):
                        kinds.discard("objects")
                if "image" not in kinds:
                    raise DataError(
                        f"the first sample of {path} has no picture; name what all have with --fields"
                    )
                return _in_order(list(kinds))
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error}; get it again") from None
    raise DataError(f"shard {path} holds no sample: no KEY.jpg or other picture; is it of another layout?")


def _lists_objects(source: FileBytes) -> bool:
    try:
        _objects(source)
    except BadSample:
        return False
    return True


def _in_order(fields: Sequence[Kind]) -> list[Kind]:
    unknown = sorted(set(fields) - set(KINDS))
    if unknown or "image" not in fields:
        raise DataError(
            f"fields {', '.join(fields)}: {f'{unknown[0]!r} is none' if unknown else 'image must be one'} of"
            f" {', '.join(KINDS)}"
        )
    return [kind for kind in KINDS if kind in fields]


def _write_entries(folder: Path, one: Scanned) -> ShardFacts:
    return write_entries(
        folder, one.path.name, len(one.made), one.size, one.sha256, one.made.entries().to_bytes()
    )


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _notes(scanned: Sequence[Scanned]) -> list[str]:
    left_out: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    for one in scanned:
        left_out += one.left_out
        ignored += one.ignored
    notes = []
    if left_out:
        told = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        first = next(one.first_left_out for one in scanned if one.first_left_out)
        notes.append(f"left out {told}; the first: {first}")
    if ignored:
        most = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))[:5]
        told = ", ".join(f"{count} .{extension}" for extension, count in most)
        notes.append(f"not read: members that end in {told}")
    return notes
