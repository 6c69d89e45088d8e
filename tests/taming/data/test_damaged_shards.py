"""Every kind of damage to shards is found by a check, and training loses or changes no sample unseen."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from taming.config import build_config
from taming.data.checking.check import check_data, check_source
from taming.data.config import FolderDataConfig, ShardsDataConfig
from taming.data.loader import train_batches
from taming.data.shards.dataset import ShardDataset
from taming.data.shards.index import Entries, parse_entries, parse_index
from taming.data.shards.pack import pack_folder
from taming.errors import DataError

SHARD = "pictures-000001.tar"
NUM = 12
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples in three shards: pictures with maps and labels."""
    root, out = tmp_path_factory.mktemp("folder"), tmp_path_factory.mktemp("pack") / "out"
    random = np.random.default_rng(0)
    for number in range(NUM):
        for kind, shape in (("images", (8, 8, 3)), ("maps", (8, 8))):
            path = root / kind / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 5, shape, dtype=np.uint8)).save(path)
    values = {"root": root, "segmentation": "maps", "num_labels": 5, "class_labels": True}
    pack_folder(build_config(FolderDataConfig, values), out, shard_samples=4)
    return out


def shards_config(root: Path, **changes: Any) -> ShardsDataConfig:
    values = {"segmentation": True, "num_labels": 5, "class_labels": True, "size": 8, "flip": False}
    return build_config(
        ShardsDataConfig,
        {"root": root, **values, "validation_fraction": 0, "skip_budget": 0} | changes,
    )


def samples(root: Path, **changes: Any) -> tuple[dict[str, tuple[bytes, bytes, int]], Counter[str], int]:
    """What one epoch of training reads, what it skips, and how many were left out on opening with a note."""
    dataset = ShardDataset(shards_config(root, **changes), "train")
    found, batches = {}, train_batches(dataset, batch_size=1, seed=0)
    for _ in range(len(dataset)):
        (batch,) = next(batches)
        image, segmentation = (batch[name].numpy().tobytes() for name in ("image", "segmentation"))
        found[batch["key"][0]] = image, segmentation, int(batch["label"])
    left_out = dataset.index.count - len(dataset)
    assert not left_out or any("left" in note for note in dataset.notes)
    return found, batches.take_skipped(), left_out


def members(path: Path) -> Members:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def rewrite(path: Path, changed: Members) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in changed:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))


def place_of(path: Path, number: int) -> tuple[int, int, int]:
    """(header, first byte, length) of a member."""
    with tarfile.open(path) as tar:
        info = tar.getmembers()[number]
        return info.offset, info.offset_data, info.size


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def vouch(pack: Path) -> None:
    """Make the index say that the shard and its entries are as they are now."""
    index = json.loads((pack / "index.json").read_text())
    for shard in index["shards"]:
        for name, prefix in ((shard["file"], ""), (shard["entries"], "entries_")):
            data = (pack / name).read_bytes()
            shard[f"{prefix}size"], shard[f"{prefix}sha256"] = len(data), hashlib.sha256(data).hexdigest()
    (pack / "index.json").write_text(json.dumps(index))


def change_entries(pack: Path, change: Callable[[Entries], None]) -> None:
    """Other entries, for which the index vouches."""
    index = parse_index((pack / "index.json").read_bytes(), "index")
    path = pack / index.shards[1].entries
    entries = parse_entries(path.read_bytes(), index.shards[1], index, "entries")
    change(entries)
    path.write_bytes(entries.to_bytes())
    vouch(pack)


def flipped_header(pack: Path) -> None:
    flip(pack / SHARD, place_of(pack / SHARD, 3)[0] + 3)


def flipped_length(pack: Path) -> None:
    flip(pack / SHARD, place_of(pack / SHARD, 3)[0] + 124 + 9)


def cut_in_a_member(pack: Path) -> None:
    _, start, size = place_of(pack / SHARD, 4)
    (pack / SHARD).write_bytes((pack / SHARD).read_bytes()[: start + size // 2])


def cut_after_a_member(pack: Path) -> None:
    (pack / SHARD).write_bytes((pack / SHARD).read_bytes()[: place_of(pack / SHARD, 4)[0]])


def flipped_payload(pack: Path) -> None:
    _, start, size = place_of(pack / SHARD, 3)
    flip(pack / SHARD, start + size // 2)


def flipped_padding(pack: Path) -> None:
    _, start, size = place_of(pack / SHARD, 3)
    flip(pack / SHARD, start + size)


def missing_member(pack: Path) -> None:
    rewrite(pack / SHARD, [m for n, m in enumerate(members(pack / SHARD)) if n != 4])


def missing_sample(pack: Path) -> None:
    rewrite(pack / SHARD, members(pack / SHARD)[3:])


def duplicate_key(pack: Path) -> None:
    rewrite(pack / SHARD, [*members(pack / SHARD), *members(pack / SHARD)[:3]])


def reordered(pack: Path) -> None:
    rewrite(pack / SHARD, [*members(pack / SHARD)[3:], *members(pack / SHARD)[:3]])


def missing_shard(pack: Path) -> None:
    (pack / SHARD).unlink()


def swapped_shards(pack: Path) -> None:
    (pack / SHARD).rename(pack / "away")
    (pack / "pictures-000002.tar").rename(pack / SHARD)
    (pack / "away").rename(pack / "pictures-000002.tar")


def trailing_garbage(pack: Path) -> None:
    with (pack / SHARD).open("ab") as file:
        file.write(b"<html>" * 100)


def missing_entries(pack: Path) -> None:
    (pack / "pictures-000001.entries.safetensors").unlink()


def flipped_entries(pack: Path) -> None:
    flip(pack / "pictures-000001.entries.safetensors", 700)


def wrong_count(pack: Path) -> None:
    index = json.loads((pack / "index.json").read_text())
    index["shards"][1]["count"] += 1
    index["count"] += 1
    (pack / "index.json").write_text(json.dumps(index))


def cut_index(pack: Path) -> None:
    (pack / "index.json").write_bytes((pack / "index.json").read_bytes()[:-100])


def shard_left_out(pack: Path) -> None:
    index = json.loads((pack / "index.json").read_text())
    index["count"] -= index["shards"].pop(1)["count"]
    (pack / "index.json").write_text(json.dumps(index))


def lying_places(pack: Path) -> None:
    """Each picture is said to lie where the next one does, checksums and all."""

    def change(entries: Entries) -> None:
        for column in vars(entries.places["image"]).values():
            column[:] = np.roll(column, -1)

    change_entries(pack, change)


def lying_sizes(pack: Path) -> None:
    change_entries(pack, lambda entries: entries.sizes.__setitem__((2, 0), 16))


def lying_labels(pack: Path) -> None:
    def change(entries: Entries) -> None:
        assert entries.labels is not None
        entries.labels[:] = 1 - entries.labels

    change_entries(pack, change)


def lying_sums(pack: Path) -> None:
    change_entries(pack, lambda entries: entries.places["image"].crc32.__setitem__(1, 7))


def bad_picture_packed(pack: Path) -> None:
    """The picture was bad before: the index vouches for what it holds."""
    _, start, size = place_of(pack / SHARD, 0)
    flip(pack / SHARD, start + size - 20)

    def change(entries: Entries) -> None:
        data = (pack / SHARD).read_bytes()[start : start + size]
        entries.places["image"].crc32[0] = zlib.crc32(data)

    change_entries(pack, change)


@dataclass(frozen=True)
class Outcome:
    found: Counter[str]
    """By a check."""
    training: Literal["reads all", "refuses", "skips", "trusts"]
    """With no budget and with one: `skips` refuses without; `trusts` takes what a whole index vouches for."""


OUTCOMES: dict[Callable[[Path], None], Outcome] = {
    flipped_header: Outcome(Counter(checksum=1, unreadable=1), "reads all"),
    flipped_length: Outcome(Counter(checksum=1, unreadable=1), "reads all"),
    cut_in_a_member: Outcome(Counter(truncated=2 + 5), "skips"),
    cut_after_a_member: Outcome(Counter(truncated=2 + 5), "skips"),
    flipped_payload: Outcome(Counter(checksum=1 + 1), "skips"),
    flipped_padding: Outcome(Counter(checksum=1), "reads all"),
    missing_member: Outcome(Counter(checksum=1 + 5, missing=1, mismatched=2), "skips"),
    missing_sample: Outcome(Counter(truncated=1 + 1, missing=1, mismatched=3, checksum=7), "skips"),
    duplicate_key: Outcome(Counter(checksum=1, duplicate=1), "reads all"),
    reordered: Outcome(Counter(checksum=1 + 8, mismatched=4 + 1), "skips"),
    missing_shard: Outcome(Counter(missing=1), "skips"),
    swapped_shards: Outcome(Counter(checksum=2 + 16, missing=8, mismatched=2), "skips"),
    trailing_garbage: Outcome(Counter(mismatched=1, unreadable=1), "refuses"),
    missing_entries: Outcome(Counter(missing=1), "refuses"),
    flipped_entries: Outcome(Counter(checksum=1, unreadable=1), "refuses"),
    wrong_count: Outcome(Counter(unreadable=1), "refuses"),
    cut_index: Outcome(Counter(unreadable=1), "refuses"),
    shard_left_out: Outcome(Counter(mismatched=1), "trusts"),
    lying_places: Outcome(Counter(mismatched=4), "trusts"),
    lying_sizes: Outcome(Counter(mismatched=1), "trusts"),
    lying_labels: Outcome(Counter(mismatched=4), "trusts"),
    lying_sums: Outcome(Counter(checksum=1), "skips"),
    bad_picture_packed: Outcome(Counter(checksum=1), "skips"),
}


def test_nothing_is_wrong_with_what_was_packed(whole: Path) -> None:
    for decode in (True, False):
        assert list(check_data(shards_config(whole), decode=decode)) == []
        assert list(check_source(str(whole / SHARD), decode=decode)) == []
    assert len(samples(whole)[0]) == NUM


@pytest.mark.parametrize("damage", OUTCOMES, ids=lambda damage: damage.__name__)
def test_damage_is_found_and_nothing_is_lost_unseen(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    pack, outcome = tmp_path / "pack", OUTCOMES[damage]
    shutil.copytree(whole, pack)
    damage(pack)
    found = list(check_source(str(pack)))
    assert Counter(finding.reason for finding in found) == outcome.found
    assert all(
        SHARD in f.path or "pictures-000002" in f.path or "entries" in f.path or "index" in f.path
        for f in found
    )
    right, *_ = samples(whole)
    if outcome.training == "reads all":
        assert samples(pack) == (right, Counter(), 0)
        return
    if outcome.training == "trusts":
        samples(pack)
        return
    with pytest.raises(DataError):
        samples(pack)
    if outcome.training == "refuses":
        with pytest.raises(DataError):
            samples(pack, skip_budget=0.9)
        return
    read, skipped, left_out = samples(pack, skip_budget=0.9)
    assert read.items() <= right.items()
    assert skipped.total() + left_out > 0
    assert set(skipped) <= set(outcome.found)


def test_tars_without_an_index_tell_what_they_can(whole: Path, tmp_path: Path) -> None:
    """What webdataset would lose in silence."""
    for damage, reasons in {
        flipped_header: {"unreadable"},
        cut_in_a_member: {"truncated", "missing"},
        cut_after_a_member: {"truncated"},
        flipped_payload: {"checksum"},
        duplicate_key: {"duplicate"},
        trailing_garbage: {"unreadable"},
    }.items():
        folder = tmp_path / damage.__name__
        folder.mkdir()
        shutil.copy(whole / SHARD, folder)
        damage(folder)
        assert {finding.reason for finding in check_source(str(folder))} >= reasons, damage.__name__
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((whole / SHARD).read_bytes()))
    (finding,) = check_source(str(packed))
    assert finding.reason == "unreadable"


def test_equal_keys_and_equal_pictures_in_two_shards(whole: Path, tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        shutil.copy(whole / SHARD, tmp_path / name)
    found = list(check_source(str(tmp_path)))
    assert Counter(finding.reason for finding in found) == Counter(duplicate=4 + 4)
    assert {len(finding.others) for finding in found} == {1}
