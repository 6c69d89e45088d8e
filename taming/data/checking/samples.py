"""What is wrong with one sample of a shard."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from taming.data.checking.findings import Finding, Findings
from taming.data.checking.pictures import PictureCheck
from taming.data.config import PicturesConfig
from taming.data.picture import FileBytes
from taming.data.shards.index import LARGEST_MEMBER, Kind, ShardIndex
from taming.data.shards.store import OpenFiles
from taming.data.shards.tar import extension_of, member_name, parse_objects
from taming.data.stored import MAP_KINDS, MapKind
from taming.errors import BadSample


@dataclass
class Sample:
    """A sample as an index, or the headers of a tar, tell of it."""

    key: str
    files: dict[Kind, tuple[int, int]] = field(default_factory=dict)
    """(place, length) in the shard."""
    suffixes: dict[Kind, str] = field(default_factory=dict)
    crc32: dict[Kind, int] = field(default_factory=dict)
    """Of those that an index tells."""
    size: tuple[int, int] | None = None
    label: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class Checked:
    """What was found, and what the picture's bytes are known by."""

    found: list[Finding]
    picture: tuple[int, bytes] | None
    """(length, sha256)."""


class SampleCheck:
    """Reads all files of samples of one shard; several threads may share it."""

    def __init__(
        self,
        config: PicturesConfig,
        index: ShardIndex | None,
        files: OpenFiles,
        path: Callable[[], Path],
        name: str,
    ) -> None:
        self._index, self._files, self._path, self._name = index, files, path, name
        num_labels = 2**16 if index is None else index.num_labels
        if config.num_labels is None and num_labels is not None:
            config = config.model_copy(update={"num_labels": num_labels})
        self._check = PictureCheck(config, decode=True)

    def __call__(self, sample: Sample) -> Checked:
        findings = Findings()
        read: dict[Kind, FileBytes] = {}
        for kind in sample.files:
            extension = extension_of(kind, sample.suffixes.get(kind, ""))
            name = f"{self._name}:{member_name(sample.key, extension)}"
            with findings.catch(name):
                read[kind] = self._read(sample, kind, name)
        picture = None
        if "image" in read:
            maps: dict[MapKind, FileBytes] = {kind: read[kind] for kind in MAP_KINDS if kind in read}
            size = self._check(read["image"], maps, findings)
            if size is not None and sample.size is not None and size != sample.size:
                detail = (
                    f"picture {read['image']} is {size[1]}x{size[0]}, and the index says"
                    f" {sample.size[1]}x{sample.size[0]}; index the tars again"
                )
                findings.add(read["image"], "mismatched", detail)
            picture = len(read["image"].data), hashlib.sha256(read["image"].data).digest()
        for kind in ("label", "objects", "text"):
            if kind in read:
                with findings.catch(read[kind]):
                    self._check_told(sample, kind, read[kind])
        return Checked(findings.found, picture)

    def _read(self, sample: Sample, kind: Kind, name: str) -> FileBytes:
        """Raises BadSample."""
        offset, size = sample.files[kind]
        if size > LARGEST_MEMBER:
            raise BadSample(f"{name} has {size} bytes, and {LARGEST_MEMBER} are allowed", "too large")
        try:
            data = self._files.read(self._path, self._name, offset, size)
        except OSError as error:
            raise BadSample(f"{name} cannot be read: {error}; get the shard again", "unreadable") from None
        if len(data) < size:
            raise BadSample(f"{name} is cut off with its shard; get the shard again", "truncated")
        if kind in sample.crc32 and zlib.crc32(data) != sample.crc32[kind]:
            raise BadSample(f"{name} holds other bytes than the index says; get the shard again", "checksum")
        return FileBytes(name, data)

    def _check_told(self, sample: Sample, kind: Kind, source: FileBytes) -> None:
        """Raises BadSample."""
        try:
            match kind:
                case "label":
                    label = int(source.data.decode("ascii"))
                    if label < 0 or (sample.label is not None and label != sample.label):
                        raise ValueError(f"its label is {label}, and the index says {sample.label}")
                case "objects":
                    names = None if self._index is None else len(self._index.object_names)
                    parse_objects(source.data, names)
                case _:
                    text = source.data.decode("utf-8")
                    if not text.strip() or (sample.caption is not None and text != sample.caption):
                        raise ValueError("it is empty, or other text than the index holds")
        except ValueError as error:
            raise BadSample(f"{source} cannot be used: {error}; pack or index again", "mismatched") from None
