"""A folder of pictures, with maps in folders beside it, as a dataset.

Everything that can be found wrong before training is found when it is opened, from the files' headers
alone but for label maps, which are read in full.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from taming.data.annotations import read_annotations
from taming.data.captions import read_captions
from taming.data.channels import ARRAY_SUFFIX, read_pixel_size
from taming.data.config import FolderDataConfig, PicturesConfig
from taming.data.dataset import Split
from taming.data.left_out import LeftOut, attempt
from taming.data.picture import SUFFIXES, Source, read_labels, read_size, suffix_of
from taming.data.scenes import SceneObject
from taming.data.stored import MAP_KINDS, MapKind, Stored, StoredDataset, held_out
from taming.errors import BadSample, DataError

_R = TypeVar("_R")
_ASPECT_TOLERANCE = 0.02  # maps may be stored at another resolution, rounded to whole pixels


@dataclass(frozen=True)
class Entry:
    """One picture and what belongs to it."""

    key: str
    """Its path within the picture folder, "/" between parts, without the suffix."""
    path: Path
    maps: dict[MapKind, Path] = field(default_factory=dict)
    label: int | None = None
    size: tuple[int, int] = (0, 0)
    """(H, W), upright."""


class FolderDataset(StoredDataset):
    """Pictures of a folder. Raises DataError for whatever is wrong with it, and says the way out.

    Single pictures that cannot be used, or have no map, are left out within `skip_budget`; `notes` says so.
    """

    def __init__(self, config: FolderDataConfig, split: Split) -> None:
        self.config = config
        self.split = split
        self.size = config.height_width
        self.skip_budget = config.skip_budget
        self.folder = picture_folder(config)
        entries = _scan_pictures(self.folder)
        left_out = LeftOut(config.root.expanduser(), len(entries), config.skip_budget)
        self.class_names: list[str] = []
        if config.class_labels:
            entries, self.class_names = _label_classes(entries, self.folder)
        for kind in map_kinds(config):
            entries = _pair(entries, config, kind, self.folder, left_out)
        self.objects: dict[str, list[SceneObject]] | None = None
        self.captions: dict[str, tuple[str, ...]] | None = None
        # Before the splits part, so that a file that is wrong about either of them is found at once.
        keys, root = [entry.key for entry in entries], config.root.expanduser()
        if config.objects is not None:
            annotations = read_annotations(root / config.objects, keys, crowds=config.crowds)
            self.objects, self.object_names = annotations.objects, annotations.names
            unused = [f"{count} {what}" for what, count in annotations.skipped.items() if count]
            if unused:
                self.notes = [f"left out of {root / config.objects}: {', '.join(unused)}"]
        if config.text is not None:
            self.captions = read_captions(root / config.text, keys)
        apart = held_out(keys, config.validation_fraction)
        entries = [entry for entry in entries if (entry.key in apart) == (split == "validation")]
        self.entries = _check_sizes(entries, config, left_out)
        self.num_labels = 0
        if config.num_labels is not None and config.segmentation is not None:
            self.num_labels = config.num_labels
            self.entries = _check_labels(self.entries, config, left_out)
        self.notes = [*self.notes, *left_out.notes()]
        names = {"image", "crop", "key", *map_kinds(config)} | ({"label"} if config.class_labels else set())
        told = {"objects": self.objects, "text": self.captions}
        self.provides = frozenset(names | {name for name, value in told.items() if value is not None})

    def __len__(self) -> int:
        return len(self.entries)

    def stored(self, index: int) -> Stored:
        entry = self.entries[index]
        return Stored(
            entry.key,
            entry.size,
            entry.path,
            entry.maps,
            entry.label,
            None if self.objects is None else self.objects[entry.key],
            None if self.captions is None else self.captions[entry.key],
        )

    def texts(self) -> Iterator[str]:
        if self.captions is not None:
            for entry in self.entries:
                yield from self.captions[entry.key]

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for entry in self.entries:
            for path in (entry.path, *entry.maps.values()):
                digest.update(f"{entry.key}/{path.suffix}/{entry.size}/{path.stat().st_size}\n".encode())
            if self.objects is not None:
                digest.update(json.dumps(self.objects[entry.key]).encode())
            if self.captions is not None:
                digest.update(json.dumps(self.captions[entry.key]).encode())
        digest.update("\n".join(self.object_names).encode())
        return digest.hexdigest()


def list_pictures(folder: Path) -> list[Path]:
    """All pictures below a folder, or else all .npy arrays, in the order of their names.

    Raises DataError where there are none.
    """
    paths, others = scan_folder(folder)
    if not paths:
        raise DataError(
            f"there are no pictures in {folder} ({others} other files); pictures end in"
            f" {', '.join(sorted(SUFFIXES))}, arrays in {ARRAY_SUFFIX}"
        )
    return paths


def map_kinds(config: FolderDataConfig) -> list[MapKind]:
    """The kinds of maps that a config names folders of."""
    return [kind for kind in MAP_KINDS if getattr(config, kind) is not None]


def picture_folder(config: FolderDataConfig) -> Path:
    """Where the pictures lie. Raises DataError."""
    root = config.root.expanduser()
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"data.root {root} {what}; give a folder of pictures with -o data.root=DIR")
    if config.images is not None:
        if not (root / config.images).is_dir():
            raise DataError(
                f"data.images: there is no folder {root / config.images}; data.root has {folders_of(root)}"
            )
        return root / config.images
    if (root / "images").is_dir():
        return root / "images"
    if kinds := map_kinds(config):
        raise DataError(
            f"data.{kinds[0]} is set, but there is no folder {root / 'images'}; set data.images to the"
            f" folder of the pictures ({folders_of(root)})"
        )
    return root


def folders_of(root: Path) -> str:
    """The folders in `root`, in words for a message."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return "the folders " + ", ".join(names) if names else "no folders"


def scan_folder(folder: Path) -> tuple[list[Path], int]:
    """Pictures below a folder in the order of their names, and how many other files there are.

    Arrays count as pictures where there are no others.
    """
    found: list[Path] = []
    arrays: list[Path] = []
    others = 0
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in SUFFIXES:
                found.append(Path(parent, name))
            elif Path(name).suffix.lower() == ARRAY_SUFFIX:
                arrays.append(Path(parent, name))
            else:
                others += 1
    if found:
        others += len(arrays)
    return sorted(found or arrays, key=lambda path: path.relative_to(folder).as_posix()), others


def key_of(path: Path, folder: Path) -> str:
    """The key of a picture, or of a map: its path within its folder, without the suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _scan_pictures(folder: Path) -> list[Entry]:
    entries: list[Entry] = []
    taken: dict[str, Path] = {}
    for path in list_pictures(folder):
        key = key_of(path, folder)
        if key in taken:
            raise DataError(
                f"pictures {taken[key]} and {path} differ only in their suffix, and names must be unique;"
                " rename or remove one"
            )
        taken[key] = path
        entries.append(Entry(key, path))
    return entries


def _pair(
    entries: Sequence[Entry], config: FolderDataConfig, kind: MapKind, pictures: Path, left_out: LeftOut
) -> list[Entry]:
    name = getattr(config, kind)
    folder = config.root.expanduser() / name
    if not folder.is_dir():
        raise DataError(
            f"data.{kind}: there is no folder {folder}; data.root has {folders_of(config.root.expanduser())}"
        )
    maps: dict[str, Path] = {}
    for path in scan_folder(folder)[0]:
        key = key_of(path, folder)
        if key in maps:
            raise DataError(f"maps {maps[key]} and {path} differ only in their suffix; remove one")
        maps[key] = path
    missing = [entry for entry in entries if entry.key not in maps]
    if missing:
        left_out.add(
            "missing",
            len(missing),
            f"picture {missing[0].path} has no map in {folder} (looked for {missing[0].key}.*)"
            f"{_more(missing)}; add the map, remove the picture, or unset data.{kind}",
        )
    surplus = sorted(set(maps) - {entry.key for entry in entries})
    if surplus:
        raise DataError(
            f"map {maps[surplus[0]]} has no picture in {pictures} (looked for {surplus[0]}.*)"
            f"{_more(surplus)}; add the picture or remove the map"
        )
    return [
        replace(entry, maps={**entry.maps, kind: maps[entry.key]}) for entry in entries if entry.key in maps
    ]


def _label_classes(entries: Sequence[Entry], folder: Path) -> tuple[list[Entry], list[str]]:
    loose = [entry for entry in entries if "/" not in entry.key]
    if loose:
        raise DataError(
            f"picture {loose[0].path} lies in no class folder{_more(loose)}; with data.class_labels every"
            f" picture lies in {folder}/CLASS/; move it or set data.class_labels=false"
        )
    names = sorted({entry.key.split("/")[0] for entry in entries})
    numbers = {name: number for number, name in enumerate(names)}
    return [replace(entry, label=numbers[entry.key.split("/")[0]]) for entry in entries], names


def _check_sizes(entries: Sequence[Entry], config: FolderDataConfig, left_out: LeftOut) -> list[Entry]:
    """Read all headers; returns the entries that can be used, with their sizes."""

    def size_of(entry: Entry) -> tuple[int, int]:
        return read_pixel_size(entry.path, config.channels, max_pixels=config.max_pixels)

    entries, sizes = left_out.sift(entries, _in_threads(size_of, entries))
    measured = [replace(entry, size=size) for entry, size in zip(entries, sizes, strict=True)]
    if not config.upscale:
        measured = _large_enough(measured, config, left_out)
    for kind in map_kinds(config):

        def map_size_of(entry: Entry, kind: MapKind = kind) -> tuple[int, int]:
            path = entry.maps[kind]
            size = map_size(path, config, kind)
            if not same_aspect(entry.size, size):
                raise BadSample(
                    f"map {path} is {size[1]}x{size[0]}, but its picture {entry.path} is"
                    f" {entry.size[1]}x{entry.size[0]}: the aspects differ; make the map cover the same view",
                    "mismatched",
                )
            return size

        measured, _ = left_out.sift(measured, _in_threads(map_size_of, measured))
    return measured


def _large_enough(entries: Sequence[Entry], config: FolderDataConfig, left_out: LeftOut) -> list[Entry]:
    height, width = config.height_width
    small = [entry for entry in entries if entry.size[0] < height or entry.size[1] < width]
    if small:
        least, first = min(min(entry.size) for entry in small), small[0]
        left_out.add(
            "mismatched",
            len(small),
            f"picture {first.path} is {first.size[1]}x{first.size[0]}, smaller than the crop {width}x{height}"
            f"{_more(small)}; set data.upscale=true, or data.size={least}, or remove it",
        )
    out = {entry.key for entry in small}
    return [entry for entry in entries if entry.key not in out]


def map_size(path: Source, config: PicturesConfig, kind: MapKind) -> tuple[int, int]:
    """(H, W) of a map from its header. Raises DataError."""
    if kind == "condition_image":
        return read_pixel_size(path, config.condition_channels, max_pixels=config.max_pixels)
    if suffix_of(path) == ARRAY_SUFFIX:
        raise DataError(f"map {path} is an array; save data.{kind} as 8 or 16-bit grey pictures")
    return read_size(path, max_pixels=config.max_pixels)


def same_aspect(picture: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a map of size `other` (H, W) can show what a picture of that size shows."""
    # One pixel of rounding is allowed too, which is much where a map is small.
    height = other[1] * picture[0] / picture[1]
    return abs(height - other[0]) <= max(1.0, _ASPECT_TOLERANCE * other[0])


def _check_labels(entries: Sequence[Entry], config: FolderDataConfig, left_out: LeftOut) -> list[Entry]:
    """Read all label maps in full; returns the entries that can be used."""
    num_labels = config.num_labels
    assert num_labels is not None

    def extremes(entry: Entry) -> tuple[int, int]:
        labels = read_labels(entry.maps["segmentation"], max_pixels=config.max_pixels)
        return int(labels.min()), int(labels.max())

    entries, found = left_out.sift(entries, _in_threads(extremes, entries))
    wrong = [n for n, (lowest, highest) in enumerate(found) if lowest < 0 or highest >= num_labels]
    if wrong:
        path, (lowest, highest) = entries[wrong[0]].maps["segmentation"], found[wrong[0]]
        most = max(highest for _, highest in found)
        if lowest < 0:
            text = f"map {path} holds label {lowest}; labels lie in [0, {num_labels})"
        else:
            text = (
                f"map {path} holds label {highest}, but data.num_labels is {num_labels};"
                f" set data.num_labels={most + 1}, or give such pixels a label below {num_labels}"
            )
        left_out.add("mismatched", len(wrong), text)
    out = set(wrong)
    return [entry for n, entry in enumerate(entries) if n not in out]


def _in_threads(function: Callable[[Entry], _R], entries: Iterable[Entry]) -> list[_R | BadSample]:
    # Pillow lets go of the interpreter while it decodes, and headers wait for the disk.
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(lambda entry: attempt(partial(function, entry)), entries))


def _more(items: Sequence[Any]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""
