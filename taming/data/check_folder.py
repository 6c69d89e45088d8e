"""Everything that is wrong with a folder of pictures and maps, in one pass."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from taming.data.annotations import read_annotations
from taming.data.captions import read_captions
from taming.data.channels import read_pixel_size, read_pixels
from taming.data.config import FolderDataConfig
from taming.data.findings import Finding, Findings, Progress, in_threads
from taming.data.folder import (
    Entry,
    MapKind,
    folders_of,
    key_of,
    list_pictures,
    map_kinds,
    map_size,
    picture_folder,
    same_aspect,
    scan_folder,
)
from taming.data.picture import read_depth, read_labels
from taming.data.png import png_fault
from taming.errors import BadSample, DataError

_LARGE = 32_000_000
"""Pictures of more pixels than this are decoded one at a time, so that memory does not grow with threads."""


def check_folder(
    config: FolderDataConfig,
    *,
    workers: int | None = None,
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """All findings: names and partners first, then file by file, then files of equal bytes.

    With `decode` every picture and map is decoded in full and every label is looked at; without, headers
    are read. Raises DataError where there is no such folder or nothing in it.
    """
    folder = picture_folder(config)
    structure = Findings()
    entries = _entries(config, folder, structure)
    _check_told(config, entries, structure)
    yield from structure.found
    task = _Check(config, decode, _shared_sizes([entry.path for entry in entries]), threading.Lock())
    same: defaultdict[bytes, list[Path]] = defaultdict(list)
    for number, (found, digest) in enumerate(in_threads(task, entries, workers), start=1):
        yield from found
        if digest is not None:
            same[digest].append(entries[number - 1].path)
        if progress is not None:
            progress(number, len(entries))
    duplicates = Findings()
    for first, *others in same.values():
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            duplicates.add(
                first, "duplicate", f"{first} holds the same bytes as {others[0]}{more}; keep one", others
            )
    yield from duplicates.found


@dataclass(frozen=True)
class _Check:
    """Looks at one picture and its maps."""

    config: FolderDataConfig
    decode: bool
    shared_sizes: frozenset[int]
    """Sizes in bytes that several pictures have: only those can be equal, and are hashed."""
    large: threading.Lock

    def __call__(self, entry: Entry) -> tuple[list[Finding], bytes | None]:
        findings, config = Findings(), self.config
        size = None
        with findings.catch(entry.path):
            size = read_pixel_size(entry.path, config.channels, max_pixels=config.max_pixels)
        if size is not None:
            self._check_picture(entry.path, size, findings)
        for kind, path in entry.maps.items():
            with findings.catch(path):
                self._check_map(kind, path, entry.path, size)
        return findings.found, self._digest(entry.path)

    def _check_picture(self, path: Path, size: tuple[int, int], findings: Findings) -> None:
        config = self.config
        height, width = config.height_width
        if (size[0] < height or size[1] < width) and not config.upscale:
            detail = (
                f"picture {path} is {size[1]}x{size[0]}, smaller than the crop {width}x{height}; remove it,"
                " set data.upscale=true, or make data.size smaller"
            )
            findings.add(path, "too small", detail)
        if self.decode:
            with findings.catch(path), self._room(size):
                read_pixels(path, config.channels, max_pixels=config.max_pixels)
                _check_sums(path)

    def _check_map(self, kind: MapKind, path: Path, picture: Path, size: tuple[int, int] | None) -> None:
        """Raises DataError."""
        config, limit = self.config, self.config.max_pixels
        own = map_size(path, config, kind)
        if self.decode:
            with self._room(own):
                if kind == "segmentation":
                    labels = read_labels(path, max_pixels=limit)
                    lowest, highest = int(labels.min()), int(labels.max())
                    assert config.num_labels is not None
                    if lowest < 0 or highest >= config.num_labels:
                        raise DataError(
                            f"map {path} holds labels from {lowest} to {highest}, but they lie in"
                            f" [0, {config.num_labels}); mend it or set data.num_labels={highest + 1}"
                        )
                elif kind == "depth":
                    read_depth(path, max_pixels=limit)
                else:
                    read_pixels(path, config.condition_channels, max_pixels=limit)
                _check_sums(path)
        if size is not None and not same_aspect(size, own):
            raise DataError(
                f"map {path} is {own[1]}x{own[0]}, but its picture {picture} is {size[1]}x{size[0]}: the"
                " aspects differ; make the map cover the same view"
            )

    def _room(self, size: tuple[int, int]) -> threading.Lock | nullcontext[None]:
        return self.large if size[0] * size[1] > _LARGE else nullcontext()

    def _digest(self, path: Path) -> bytes | None:
        try:
            if path.stat().st_size not in self.shared_sizes or not path.is_file():
                return None
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return None  # reading it as a picture has said why


def _check_sums(path: Path) -> None:
    """Damage that left the pixels whole: training does not mind, but a copy went wrong. Raises BadSample."""
    with path.open("rb") as file:
        fault = png_fault(file)
    if fault is not None:
        what = "is cut off behind its pixels" if fault == "truncated" else "has a wrong checksum"
        raise BadSample(f"picture {path} {what}, though its pixels can be read; fetch it again", fault)


def _entries(config: FolderDataConfig, folder: Path, findings: Findings) -> list[Entry]:
    """Every picture with the maps that it has; names and partners that are wrong are findings."""
    by_key: dict[str, Entry] = {}
    entries = []
    for path in list_pictures(folder):
        key = key_of(path, folder)
        entry = Entry(key, path)
        if key in by_key:
            other = by_key[key].path
            detail = f"pictures {other} and {path} differ only in their suffix; rename or remove one"
            findings.add(path, "duplicate", detail, (other,))
        else:
            by_key[key] = entry
        entries.append(entry)
        if config.class_labels and "/" not in key:
            detail = f"picture {path} lies in no class folder; move it to {folder}/CLASS/ or remove it"
            findings.add(path, "mismatched", detail)
    for kind in map_kinds(config):
        _pair(by_key, config, kind, folder, findings)
    return entries


def _pair(
    by_key: dict[str, Entry], config: FolderDataConfig, kind: MapKind, pictures: Path, findings: Findings
) -> None:
    root = config.root.expanduser()
    folder = root / getattr(config, kind)
    if not folder.is_dir():
        raise DataError(f"data.{kind}: there is no folder {folder}; data.root has {folders_of(root)}")
    maps: dict[str, Path] = {}
    for path in scan_folder(folder)[0]:
        key = key_of(path, folder)
        if key in maps:
            detail = f"maps {maps[key]} and {path} differ only in their suffix; remove one"
            findings.add(path, "duplicate", detail, (maps[key],))
        elif key not in by_key:
            detail = f"map {path} has no picture in {pictures} (looked for {key}.*); add it or remove the map"
            findings.add(path, "mismatched", detail)
        else:
            maps[key] = path
            by_key[key].maps[kind] = path
    for key, entry in by_key.items():
        if key not in maps:
            detail = (
                f"picture {entry.path} has no map in {folder} (looked for {key}.*); add the map or remove"
                " the picture"
            )
            findings.add(entry.path, "mismatched", detail)


def _check_told(config: FolderDataConfig, entries: Sequence[Entry], findings: Findings) -> None:
    """Boxes and captions."""
    root, keys = config.root.expanduser(), [entry.key for entry in entries]
    if config.objects is not None:
        with findings.catch(root / config.objects):
            read_annotations(root / config.objects, keys, crowds=config.crowds)
    if config.text is not None and (root / config.text).is_dir():
        for entry in entries:
            with findings.catch(entry.path):
                read_captions(root / config.text, [entry.key])
    elif config.text is not None:
        with findings.catch(root / config.text):
            read_captions(root / config.text, keys)


def _shared_sizes(paths: Sequence[Path]) -> frozenset[int]:
    sizes: Counter[int] = Counter()
    for path in paths:
        try:
            sizes[path.stat().st_size] += 1
        except OSError:
            continue  # a link to nowhere: reading it says so
    return frozenset(size for size, count in sizes.items() if size and count > 1)
