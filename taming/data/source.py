"""DATA on a command line: a folder, shards, a config file or the word "scenes"."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taming.config import Config, build_config, parse_override, read_yaml, set_value
from taming.data.config import DataConfig, ScenesDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.errors import DataError, DataWarning


class _Source(Config):
    data: DataConfig


def data_from(source: str, *, size: tuple[int, int] | int, overrides: Sequence[str] = ()) -> DataConfig:
    """The data config that a user means by `source`.

    A folder of pictures; a folder or an address of shards, with all that they hold; a YAML file whose
    section `data` is taken (a run's config.yaml, say); or "scenes".
    `size` is used where the source does not say one; `overrides` are "key=value" of the data section.
    Raises UserError.
    """
    path = Path(source)
    values: dict[str, Any]
    if source == "scenes":
        values = {"kind": "scenes"}
    elif is_pack(source):
        values = _of_shards(source)
    elif path.is_dir():
        values = {"kind": "folder", "root": source}
    elif path.is_file() and path.suffix in (".yaml", ".yml"):
        section = read_yaml(path).get("data")
        if not isinstance(section, dict):
            raise DataError(f"{source} has no section `data`; give a folder of pictures or a training config")
        values = dict(section)
    else:
        raise DataError(
            f"no data at {source!r}: give a folder of pictures or shards, a training config, or `scenes`"
        )
    values.setdefault("size", size if isinstance(size, int) else list(size))
    document = {"data": values}
    for override in overrides:
        key, value = parse_override(override)
        set_value(document, f"data.{key.removeprefix('data.')}", value)
    return build_config(_Source, document, source=source).data


def is_pack(source: str) -> bool:
    """Whether shards are meant: an http or https address, or a folder with an index of shards."""
    from taming.data.shards.index import FORMAT, INDEX
    from taming.data.shards.remote import is_address

    if is_address(source):
        return True
    try:
        with (Path(source).expanduser() / INDEX).open("rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


def _of_shards(source: str) -> dict[str, Any]:
    """Values of a config that reads all that shards hold."""
    from taming.data.config import ShardsDataConfig
    from taming.data.shards.store import open_store

    index = open_store(build_config(ShardsDataConfig, {"root": source}, source=source)).index()
    given = {"class_labels" if kind == "label" else kind: True for kind in index.fields if kind != "image"}
    return {"kind": "shards", "root": source, "num_labels": index.num_labels, **given}


class AllSplits(PictureDataset):
    """Both splits of a data set, one after the other: for measuring on everything."""

    def __init__(self, parts: Sequence[PictureDataset]) -> None:
        self.parts = [part for part in parts if len(part)]
        first = parts[0]
        self.size, self.provides = first.size, first.provides
        self.class_names, self.num_labels = first.class_names, first.num_labels
        self.object_names, self.skip_budget = first.object_names, first.skip_budget
        self.notes = list(dict.fromkeys(note for part in parts for note in part.notes))

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        for part in self.parts:
            if index < len(part):
                return part.sample(index, epoch, seed=seed)
            index -= len(part)
        raise IndexError(index)

    def texts(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.texts()

    def fingerprint(self) -> str:
        return "/".join(part.fingerprint() for part in self.parts)


def open_split(config: DataConfig, split: str) -> PictureDataset:
    """The split "train", "validation" or "all" of a data set. Raises UserError.

    "all" of the scenes is their validation split: their training split has no end. Warns of what its notes
    say: whoever measures or converts must know what was left out.
    """
    dataset = _open_split(config, split)
    for note in dataset.notes:
        warnings.warn(note, DataWarning, stacklevel=2)
    return dataset


def _open_split(config: DataConfig, split: str) -> PictureDataset:
    match split:
        case "train" | "validation":
            return open_dataset(config, split)
        case "all":
            if isinstance(config, ScenesDataConfig):
                return open_dataset(config, "validation")
            return AllSplits([open_dataset(config, "train"), open_dataset(config, "validation")])
        case _:
            raise DataError(f"no split {split!r}: choose all, train or validation")


def open_splits(config: DataConfig) -> tuple[PictureDataset, PictureDataset]:
    """The training and the validation split, what was left out of either in the notes of the first.

    Raises UserError where there is nothing to evaluate on.
    """
    splits = open_dataset(config, "train"), open_dataset(config, "validation")
    if not len(splits[1]):
        raise DataError(
            "no validation pictures are left; raise data.validation_fraction (or data.num_validation), or "
            "give more pictures"
        )
    train, validation = splits
    other = [f"of those to evaluate on: {note}" for note in validation.notes if note not in train.notes]
    train.notes = [*train.notes, *other]
    return splits
