"""Folders of pictures packed as shards."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from taming.atomic import sync, whole_folder
from taming.data.config import FolderDataConfig
from taming.data.dataset import PictureDataset
from taming.data.folder import FolderDataset
from taming.data.order import epoch_order
from taming.data.picture import suffix_of
from taming.data.shards.index import (
    ENTRIES_SUFFIX,
    INDEX,
    KINDS,
    LARGEST_MEMBER,
    Entries,
    Kind,
    Places,
    ShardFacts,
    ShardIndex,
    check_key,
    joined,
)
from taming.data.shards.tar import BLOCK, Member, TarWriter, extension_of, objects_json
from taming.data.stored import Stored
from taming.disk import free_bytes
from taming.errors import BadSample, DataError
from taming.units import format_bytes

Progress = Callable[[int, int], None]
NAME = "pictures"


@dataclass(frozen=True)
class Packed:
    """What was written."""

    index: ShardIndex
    notes: list[str]
    """What a user should know: what was left out."""


def pack_folder(
    config: FolderDataConfig,
    out: Path,
    *,
    shard_bytes: int = 2**28,
    shard_samples: int | None = None,
    shuffle: int | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write all pictures of a folder, with what the config says belongs to them, as shards in `out`.

    A shard is full before it would exceed `shard_bytes`, or at `shard_samples`. Samples keep the folder's
    order, or take the one of the seed `shuffle`. Files keep their bytes; equal data gives equal shards.
    `out` is whole or absent. `progress` takes (written, how many there are).
    Raises DataError: for what is wrong with the folder, where `out` is in use, and for a disk too small.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder; give another --out")
    # Both splits, whatever crops will be cut out of them.
    whole = {"size": 1, "resize": None, "upscale": True, "validation_fraction": 0.0}
    dataset = FolderDataset(config.model_copy(update=whole), "train")
    samples = [dataset.stored(index) for index in range(len(dataset))]
    for sample in samples:
        _check(sample)
    if shuffle is not None:
        samples = [samples[row] for row in epoch_order(shuffle, 0, len(samples))]
    out.parent.mkdir(parents=True, exist_ok=True)
    needed = _check_room(samples, out)
    try:
        with whole_folder(out) as folder:
            index = _write(samples, dataset, folder, shard_bytes, shard_samples, progress)
            notes = list(dataset.notes)
    except OSError as error:
        raise DataError(
            f"{out} was not written ({error}); it needs about {format_bytes(needed)}: free that much or give"
            " --out on another disk"
        ) from None
    return Packed(index, notes)


def _write(
    samples: Sequence[Stored],
    dataset: PictureDataset,
    folder: Path,
    shard_bytes: int,
    shard_samples: int | None,
    progress: Progress | None,
) -> ShardIndex:
    shards: list[ShardFacts] = []
    done = 0
    while done < len(samples):
        name = f"{NAME}-{len(shards):06d}"
        made = EntriesMaker()
        with TarWriter(folder / f"{name}.tar") as tar:
            while done < len(samples) and (shard_samples is None or len(made) < shard_samples):
                files = _files(samples[done])
                length = sum(_padded(len(data)) for _, _, data in files)
                if len(made) and tar.size + length > shard_bytes:
                    break
                _add(samples[done], files, tar, made)
                done += 1
                if progress is not None:
                    progress(done, len(samples))
        entries = made.entries().to_bytes()
        shards.append(write_entries(folder, f"{name}.tar", len(made), tar.size, tar.sha256, entries))
    index = ShardIndex(
        count=len(samples),
        fields=[kind for kind in KINDS if kind in dataset.provides],
        class_names=dataset.class_names,
        num_labels=dataset.num_labels or None,
        object_names=list(dataset.object_names),
        shards=shards,
    )
    (folder / INDEX).write_bytes(index.to_bytes())
    return index


def write_entries(folder: Path, file: str, count: int, size: int, sha256: str, entries: bytes) -> ShardFacts:
    """Write the entries of a shard beside it, and say what the index says of both."""
    import hashlib

    name = file.removesuffix(".tar") + ENTRIES_SUFFIX
    (folder / name).write_bytes(entries)
    sync(folder / name)
    return ShardFacts(
        file=file,
        count=count,
        size=size,
        sha256=sha256,
        entries=name,
        entries_size=len(entries),
        entries_sha256=hashlib.sha256(entries).hexdigest(),
    )


@dataclass
class EntriesMaker:
    """Collects the entries of a shard, sample by sample."""

    keys: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    captions: list[bytes] = field(default_factory=list)
    suffixes: dict[str, int] = field(default_factory=dict)
    rows: dict[Kind, list[tuple[int, int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def __len__(self) -> int:
        return len(self.keys)

    def add(
        self, key: str, size: tuple[int, int], *, label: int | None = None, caption: bytes | None = None
    ) -> None:
        self.keys.append(key.encode())
        self.sizes.append(size)
        if label is not None:
            self.labels.append(label)
        if caption is not None:
            self.captions.append(caption)

    def place(self, kind: Kind, member: Member, crc32: int, suffix: str) -> None:
        """Where a file of the sample that was just added lies."""
        number = self.suffixes.setdefault(suffix, len(self.suffixes))
        self.rows[kind].append((member.offset, member.size, crc32, number))

    def entries(self) -> Entries:
        keys, key_ends = joined(self.keys)
        captions, caption_ends = joined(self.captions)
        places: dict[Kind, Places] = {}
        for kind, rows in self.rows.items():
            offset, size, crc32, suffix = np.array(rows, dtype=np.int64).T
            places[kind] = Places(offset, size, crc32, suffix)
        return Entries(
            keys=keys,
            key_ends=key_ends,
            sizes=np.array(self.sizes, dtype=np.int32),
            places=places,
            suffixes=list(self.suffixes),
            labels=np.array(self.labels, dtype=np.int64) if self.labels else None,
            captions=captions,
            caption_ends=caption_ends if self.captions else None,
        )


File = tuple[Kind, str, bytes]
"""What a file is, its suffix and its bytes."""


def _files(sample: Stored) -> list[File]:
    """All that a shard holds of a sample. Raises BadSample."""
    files: list[File] = [("image", suffix_of(sample.image), _read(sample.image))]
    files += [(kind, suffix_of(source), _read(source)) for kind, source in sample.maps.items()]
    if sample.label is not None:
        files.append(("label", "", str(sample.label).encode()))
    if sample.objects is not None:
        files.append(("objects", "", objects_json(sample.objects)))
    if sample.captions is not None:
        files.append(("text", "", "\n".join(sample.captions).encode()))
    return files


def _add(sample: Stored, files: Sequence[File], tar: TarWriter, made: EntriesMaker) -> None:
    told = {kind: data for kind, _, data in files}
    made.add(sample.key, sample.size, label=sample.label, caption=told.get("text"))
    for kind, suffix, data in files:
        member = tar.add(sample.key, extension_of(kind, suffix), data)
        if kind != "label":
            made.place(kind, member, zlib.crc32(data), suffix)


def _read(source: object) -> bytes:
    assert isinstance(source, Path)
    try:
        return source.read_bytes()
    except FileNotFoundError:
        raise BadSample(f"picture {source} does not exist any more; put it back", "missing") from None
    except OSError as error:
        raise BadSample(
            f"picture {source} cannot be read: {error}; mend or remove it", "unreadable"
        ) from None


def _check(sample: Stored) -> None:
    """Whether a key can be told to others, and its files can be read whole. Raises DataError."""
    try:
        sample.key.encode()
        check_key(sample.key)
    except ValueError as error:
        raise DataError(
            f"picture {sample.image} cannot be packed: {error}; rename it".encode(errors="replace").decode()
        ) from None
    for source in (sample.image, *sample.maps.values()):
        if _length(source) > LARGEST_MEMBER:
            raise BadSample(
                f"picture {source} has {format_bytes(_length(source))}, and shards take files of up to"
                f" {format_bytes(LARGEST_MEMBER)}; make it smaller or remove it",
                "too large",
            )


def _check_room(samples: Sequence[Stored], out: Path) -> int:
    """The bytes that the samples will take. Raises DataError where the disk has less."""
    needed = 0
    for sample in samples:
        needed += sum(_padded(_length(source)) for source in (sample.image, *sample.maps.values()))
        told = (sample.label, sample.objects, sample.captions)
        needed += sum(2 * BLOCK + len(str(value)) for value in told if value is not None) + 256
    free = free_bytes(out)
    if free < needed:
        raise DataError(
            f"{out} needs about {format_bytes(needed)}, and its disk has {format_bytes(free)} left; free some"
            " or give --out on another disk"
        )
    return needed


def _length(source: object) -> int:
    assert isinstance(source, Path)
    try:
        return source.stat().st_size
    except OSError:
        return 0  # reading it says why


def _padded(size: int) -> int:
    return BLOCK + size + -size % BLOCK
