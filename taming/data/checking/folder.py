"""Everything that is wrong with a folder of pictures and maps, in one pass."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from taming.data.annotations import read_annotations
from taming.data.captions import read_captions
from taming.data.checking.findings import Finding, Findings, Progress, duplicates, in_threads
from taming.data.checking.pictures import PictureCheck
from taming.data.config import FolderDataConfig
from taming.data.folder import (
    Entry,
    folders_of,
    key_of,
    list_pictures,
    map_kinds,
    picture_folder,
    scan_folder,
)
from taming.data.stored import MapKind
from taming.errors import DataError


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
    task = _Check(config, decode, _shared_sizes([entry.path for entry in entries]))
    same: defaultdict[bytes, list[Path]] = defaultdict(list)
    results = in_threads(task, entries, workers)
    for number, (entry, (found, digest)) in enumerate(zip(entries, results, strict=True), start=1):
        yield from found
        if digest is not None:
            same[digest].append(entry.path)
        if progress is not None:
            progress(number, len(entries))
    yield from duplicates(same.values())


class _Check:
    def __init__(self, config: FolderDataConfig, decode: bool, shared_sizes: frozenset[int]) -> None:
        self._check = PictureCheck(config, decode=decode)
        self._shared_sizes = shared_sizes
        """Sizes in bytes that several pictures have: only those can be equal, and are hashed."""

    def __call__(self, entry: Entry) -> tuple[list[Finding], bytes | None]:
        findings = Findings()
        self._check(entry.path, entry.maps, findings)
        return findings.found, self._digest(entry.path)

    def _digest(self, path: Path) -> bytes | None:
        try:
            if path.stat().st_size not in self._shared_sizes or not path.is_file():
                return None
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").digest()
        except OSError:
            return None  # reading it as a picture has said why


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
            findings.add(entry.path, "missing", detail)


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
