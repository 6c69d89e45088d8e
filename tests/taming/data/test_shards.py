from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from pydantic import ValidationError

from taming.config import build_config
from taming.data.config import FolderDataConfig, ShardsDataConfig
from taming.data.dataset import open_dataset
from taming.data.loader import evaluation_batches, train_batches
from taming.data.shards.dataset import ShardDataset
from taming.data.shards.index import Entries, parse_entries, parse_index
from taming.data.shards.pack import pack_folder
from taming.data.shards.tar import key_of_member, member_name
from taming.data.source import data_from, is_pack, open_split
from taming.errors import BadSample, ConfigError, DataError
from tests.taming.data.shard_data import assert_equal_samples, of_shards, write_everything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> FolderDataConfig:
    return write_everything(tmp_path_factory.mktemp("data") / "folder")


@pytest.fixture(scope="module")
def packed(folder: FolderDataConfig) -> Path:
    """Three shards, of three, three and two samples."""
    out = folder.root.parent / "pack"
    pack_folder(folder, out, shard_samples=3)
    return out


@pytest.fixture
def pack(packed: Path, tmp_path: Path) -> Path:
    """A pack that a test may damage."""
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_pack_is_its_folder(folder: FolderDataConfig, packed: Path) -> None:
    for split in ("train", "validation"):
        assert_equal_samples(open_dataset(folder, split), open_dataset(of_shards(folder, packed), split))
    first, second = open_dataset(folder, "train"), open_dataset(of_shards(folder, packed), "train")
    assert np.array_equal(first.order(3, 1), second.order(3, 1))
    assert list(first.texts()) == list(second.texts())
    assert len(list(second.texts())) == 2 * len(second)
    plain = {"size": 16, "validation_fraction": 0.3}
    bare = FolderDataConfig(root=folder.root, **plain), ShardsDataConfig(root=str(packed), **plain)
    assert_equal_samples(open_dataset(bare[0], "train"), open_dataset(bare[1], "train"))


def test_files_keep_their_bytes_and_webdataset_reads_them(folder: FolderDataConfig, packed: Path) -> None:
    tars = [str(path) for path in sorted(packed.glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(read) == 8
    for sample in read:
        key = sample["__key__"].replace("%2E", ".").replace("%25", "%")
        (picture,) = (folder.root / "images" / key).parent.glob(f"{Path(key).name}.*")
        assert sample[picture.suffix.lower()[1:]] == picture.read_bytes()
        for extension, name in (("segmentation.png", "labels"), ("depth.png", "depth")):
            assert sample[extension] == (folder.root / name / f"{key}.png").read_bytes()
        assert sample["condition.webp"] == (folder.root / "edges" / f"{key}.webp").read_bytes()
        assert sample["cls"] == b"01"[" " in key and key[0] == "b" :][:1]
        assert sample["txt"].decode().startswith("number")
        assert "objects" in json.loads(sample["json"])


def test_equal_data_gives_equal_shards(folder: FolderDataConfig, packed: Path, tmp_path: Path) -> None:
    pack_folder(folder, tmp_path / "again", shard_samples=3)
    for path in packed.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    # By size: a shard holds what fits, and at least one sample.
    first = parse_index((packed / "index.json").read_bytes(), "index").shards[0]
    by_size = pack_folder(folder, tmp_path / "size", shard_bytes=first.size).index
    assert by_size.shards[0] == first
    assert pack_folder(folder, tmp_path / "one", shard_bytes=1).index.shards[7].count == 1
    shuffled = pack_folder(folder, tmp_path / "shuffled", shuffle=1).index
    datasets = [open_dataset(of_shards(folder, root), "train") for root in (packed, tmp_path / "shuffled")]
    keys = [[data.sample(n, -1)["key"] for n in range(len(data))] for data in datasets]
    assert len(shuffled.shards) == 1
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1])
    assert datasets[0].fingerprint() != datasets[1].fingerprint()


def test_a_pack_is_whole_or_absent(
    folder: FolderDataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder"):
        pack_folder(folder, out)
    (out / "mine.txt").unlink()

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"was not written .*No space left.* free that much"):
        pack_folder(folder, out, progress=interrupt)
    assert list(out.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"needs about .* and its disk has 1000 B left"):
        pack_folder(folder, out)
    monkeypatch.undo()
    assert pack_folder(folder, out).index.count == 8
    surrogate = tmp_path / "odd"
    surrogate.mkdir()
    Image.new("RGB", (16, 16)).save(surrogate / "back\\slash.png")
    with pytest.raises(DataError, match=r"cannot be packed: key .* rename it"):
        pack_folder(FolderDataConfig(root=surrogate), tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_once_an_epoch_on_any_number_of_processes(
    folder: FolderDataConfig, packed: Path, workers: int
) -> None:
    """Three shards, read one after another: there are more readers than shards, and than samples of one."""
    config = of_shards(folder, packed, shuffle_shards=1, validation_fraction=0.0)
    data = open_dataset(config, "train")
    runs: list[list[list[str]]] = []
    for ranks in (1, 2, 4):
        loaders = [
            train_batches(data, batch_size=4, seed=3, rank=rank, world_size=ranks, workers=workers)
            for rank in range(ranks)
        ]
        steps = [
            [key for (batch,) in parts for key in batch["key"]]
            for parts in islice(zip(*loaders, strict=True), 4)
        ]
        assert all(count == 1 for count in Counter(steps[0] + steps[1]).values())
        assert set(steps[0] + steps[1]) == set(steps[2] + steps[3])
        assert len(set(steps[0] + steps[1])) == 8
        runs.append(steps)
        held_out = [
            evaluation_batches(data, batch_size=4, rank=rank, world_size=ranks) for rank in range(ranks)
        ]
        assert Counter(key for part in held_out for batch in part for key in batch["key"]).total() == 8
    assert runs[0] == runs[1] == runs[2]


def test_an_order_goes_through_blocks_of_shards(folder: FolderDataConfig, packed: Path) -> None:
    data = ShardDataset(of_shards(folder, packed, shuffle_shards=2, validation_fraction=0.0), "train")
    shards = np.repeat([0, 1, 2], [3, 3, 2])
    seen = set()
    for seed in range(3):
        for epoch in range(8):
            order = data.order(seed, epoch)
            assert sorted(order) == list(range(8))
            # Two shards are mixed, and one comes after them.
            last = shards[order[-1]]
            first, rest = np.split(shards[order], [8 - (shards == last).sum()])
            assert set(rest) == {last}
            seen.add((int(last), bool((np.diff(first) == 0).sum() < len(first) - 2), order.tobytes()))
    assert {place for place, _, _ in seen} == {0, 1, 2}
    assert sum(mixed for _, mixed, _ in seen) > 20
    again = ShardDataset(of_shards(folder, packed, shuffle_shards=2, validation_fraction=0.0), "train")
    assert np.array_equal(again.order(1, 5), data.order(1, 5))


def test_opening_reads_no_shard_and_processes_have_their_own_files(
    folder: FolderDataConfig, pack: Path
) -> None:
    data, fresh = (open_dataset(of_shards(folder, pack), "train") for _ in range(2))
    expected = data.sample(0, 1)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.sample(0, 1)["image"], expected["image"])
    for path in pack.glob("*.tar"):
        path.unlink()
    assert torch.equal(data.sample(0, 1)["depth"], expected["depth"])  # its file is still open
    with pytest.raises(BadSample, match="gone with its shard") as error:
        fresh.sample(0, 1)
    assert error.value.reason == "missing"


def test_damage_to_a_shard_is_found(folder: FolderDataConfig, pack: Path) -> None:
    shard = pack / "pictures-000000.tar"
    whole = shard.read_bytes()

    def opened(**options: Any) -> ShardDataset:
        return ShardDataset(of_shards(folder, pack, validation_fraction=0.0, **options), "train")

    def reasons() -> list[str | None]:
        data = opened()
        found: list[str | None] = []
        for n in range(3):
            try:
                data.sample(n, 0)
                found.append(None)
            except BadSample as error:
                found.append(error.reason if str(shard) in str(error) else "without a name")
        return found

    assert reasons() == [None] * 3
    places = ShardDataset(of_shards(folder, pack), "train").entries[0].places
    flipped = bytearray(whole)
    flipped[int(places["depth"].offset[1]) + 9] ^= 4
    shard.write_bytes(flipped)
    assert reasons() == [None, "checksum", None]
    shard.write_bytes(whole[: int(places["image"].offset[2]) + 10])
    with pytest.raises(DataError, match=rf"has \d+ bytes, not the {len(whole)} of the index; 1 of 8"):
        opened()
    short = opened(skip_budget=0.5)
    assert len(short) == 7
    assert "left 1 truncated out of 8 pictures" in short.notes[0]
    shard.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=rf"has {len(whole) + 1} bytes, not the {len(whole)}"):
        opened(skip_budget=0.5)
    shard.unlink()
    with pytest.raises(DataError, match=r"pictures-000000\.tar is in the index and not there.*\(3 missing\)"):
        opened()
    assert len(opened(skip_budget=0.5)) == 5
    # What becomes short while it is read.
    shard.write_bytes(whole)
    data = opened(skip_budget=0.5)
    shard.write_bytes(whole[: int(places["image"].offset[2]) + 10])
    batches = train_batches(data, batch_size=8, seed=0)
    next(batches)
    assert batches.take_skipped() == {"truncated": 1}


def test_what_index_and_entries_say_is_checked(folder: FolderDataConfig, pack: Path) -> None:
    path = pack / "index.json"
    values = json.loads(path.read_bytes())

    def refused(message: str, change: dict[str, Any], **shard: Any) -> None:
        first = {**values["shards"][0], **shard}
        path.write_text(json.dumps({**values, "shards": [first, *values["shards"][1:]], **change}))
        with pytest.raises(DataError, match=message) as error:
            open_dataset(of_shards(folder, pack), "train")
        assert "\n" not in str(error.value)

    refused("no index of the format", {"format": "taming-shards/9"})
    for name in ("../pictures-000000.tar", "/etc/passwd", "..", ".hidden.tar", "a\\b.tar", ""):
        refused("plain name", {}, file=name)
        refused("plain name", {}, entries=name)
    refused("sha256", {}, sha256="../../../x")
    refused("do not hold the 9 samples", {"count": 9})
    refused("names a file twice", {}, file="pictures-000001.tar")
    refused("fields", {"fields": ["label"]})
    refused("which labels", {"num_labels": None})
    refused("unknown key shards.0.extra", {}, extra=1)
    refused("holds other bytes", {}, entries_sha256="0" * 64)
    refused("more than the shard has", {}, entries_size=2**40)
    for text in (b"{", b"[" * 10**5, b"\xff", b"[]"):
        path.write_bytes(text)
        with pytest.raises(DataError, match=r"as JSON|no index of"):
            open_dataset(of_shards(folder, pack), "train")
    path.unlink()
    with pytest.raises(DataError, match="taming data pack"):
        open_dataset(of_shards(folder, pack), "train")


def test_labels_that_the_index_denies_are_bad_samples(folder: FolderDataConfig, pack: Path) -> None:
    values = json.loads((pack / "index.json").read_bytes())
    (pack / "index.json").write_text(json.dumps({**values, "num_labels": 2}))
    data = open_dataset(of_shards(folder, pack, num_labels=2), "train")
    with pytest.raises(BadSample, match=r"holds labels from 0 to 4; they lie in \[0, 2\)") as error:
        data.sample(0, -1)
    assert error.value.reason == "mismatched"


def test_entries_stay_within_their_shard(packed: Path) -> None:
    index = parse_index((packed / "index.json").read_bytes(), "index")
    shard, data = index.shards[0], (packed / index.shards[0].entries).read_bytes()
    entries = parse_entries(data, shard, index, "entries")

    def refused(message: str, made: Entries) -> None:
        with pytest.raises(DataError, match=message):
            parse_entries(made.to_bytes(), shard, index, "entries")

    def replaced(**changes: Any) -> Entries:
        return Entries(**{**vars(entries), **changes})

    def moved(**changes: Any) -> Entries:
        places = type(entries.places["image"])(**{**vars(entries.places["image"]), **changes})
        return replaced(places={**entries.places, "image": places})

    assert parse_entries(entries.to_bytes(), shard, index, "entries").keys == entries.keys
    refused("outside of the shard", moved(offset=entries.places["image"].offset - 2**40))
    refused("outside of the shard", moved(offset=entries.places["image"].offset + shard.size))
    refused("wrongly", moved(suffix=entries.places["image"].suffix + 200))
    refused("not \\(3,\\)", moved(crc32=entries.places["image"].crc32[:2]))
    refused("2 classes", replaced(labels=np.array([0, 1, 2])))
    refused("not those of pictures", replaced(sizes=entries.sizes * 0))
    refused("keys do not end", replaced(key_ends=entries.key_ends[::-1].copy()))
    # Differences of these do not fit into 64 bits, and look right.
    refused("keys do not end", replaced(key_ends=np.array([2**62, -(2**63), entries.key_ends[-1]])))
    refused("segmentation/offset' is missing", replaced(places={"image": entries.places["image"]}))
    refused("captions begin within", replaced(captions="aéb".encode(), caption_ends=np.array([1, 2, 4])))
    refused("captions do not end", replaced(caption_ends=entries.key_ends + 10**6))
    for keys in (b"../a", b"/etc", b"a/../b", b"a//b", b"a\n", b"a\\b", b"\xff\xff"):
        ends = np.array([1, 2, 2 + len(keys)])
        refused("get it again", replaced(keys=b"xy" + keys, key_ends=ends))
    for damaged in (data[:-1], data[:40], b"", b"\xff" * 64):
        with pytest.raises(DataError, match="does not describe the shard"):
            parse_entries(damaged, shard, index, "entries")


def test_mistakes_are_told_before_training(folder: FolderDataConfig, packed: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset(of_shards(folder, packed, **options), "train")

    refused(r"24x2\d, smaller than the crop 64x64; set data\.upscale=true", size=64, resize=None)
    refused(r"set data\.num_labels=5", num_labels=3)
    refused(r"more than data\.max_pixels = 480", max_pixels=480)
    some = of_shards(folder, packed, max_pixels=480, skip_budget=0.9, validation_fraction=0.0)
    assert [open_dataset(some, "train").sample(0, 0)["key"]] == ["a/picture 0.v1%2E"]
    with pytest.raises(DataError, match="taming data pack"):
        open_dataset(of_shards(folder, packed.parent), "train")
    assert open_dataset(of_shards(folder, packed, size=64, resize=None, upscale=True), "train").sample(0, 0)
    pack_folder(FolderDataConfig(root=folder.root / "edges"), packed.parent / "plain")
    with pytest.raises(DataError, match=r"data\.depth is set, but the shards in .* hold image;"):
        open_dataset(ShardsDataConfig(root=str(packed.parent / "plain"), size=16, depth=True), "train")


def test_only_folders_and_addresses_are_roots(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for root in (f"pipe:touch {canary}", "ftp://x/y", "s3://x", "gs:x", "file://host/x", "http:", "https://"):
        with pytest.raises(ConfigError, match="and from nothing else"):
            build_config(ShardsDataConfig, {"root": root})
    assert not canary.exists()
    assert build_config(ShardsDataConfig, {"root": "file:///a%20b/c"}).root == "/a b/c"
    assert build_config(ShardsDataConfig, {"root": "c:/x"}).root == "c:/x"
    assert build_config(ShardsDataConfig, {"root": "x", "cache_size": "1.5G"}).cache_size == 3 * 2**29
    for options in ({"cache_size": "much"}, {"images": "x"}, {"crowds": True}, {"segmentation": True}):
        with pytest.raises(ConfigError):
            build_config(ShardsDataConfig, {"root": "x", **options})
    with pytest.raises(ValidationError):
        ShardsDataConfig(root="x", resize=8, size=16)


def test_a_folder_of_shards_is_understood_on_a_command_line(folder: FolderDataConfig, packed: Path) -> None:
    assert is_pack(str(packed))
    assert not is_pack(str(folder.root))
    config = data_from(str(packed), size=16, overrides=["data.depth=false"])
    assert isinstance(config, ShardsDataConfig)
    assert config.gives == {"image": 3, "segmentation": 5, "condition_image": 3}
    data = open_split(config, "all")
    assert len(data) == 8
    assert data.provides == open_dataset(folder, "train").provides - {"depth"}


@pytest.mark.parametrize("key", ["a", "a.b", "a%2Eb", "x.y/a.b.c", "%", "%25.", "ü b/ß.jpg"])
def test_keys_survive_the_names_of_members(key: str) -> None:
    name = member_name(key, "segmentation.png")
    assert key_of_member(name) == (key, "segmentation.png")
    base, extension = webdataset.tariterators.base_plus_ext(name)
    assert (base + "." + extension, extension) == (name, "segmentation.png")
