"""Codes on disk: what is written is what the tokenizer says, and damage is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stage1_vq import VQModel
from stage1_vq.codes import read_index, read_shards, write_codes
from stage2_ar.codes import CodeDataset
from taming.data.batch import to_device
from taming.data.boxes import mirror_objects
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.data.loader import train_batches
from taming.data.scenes import CLASS_NAMES
from taming.errors import DataError, UserError


@pytest.fixture
def folder(tokenizer: VQModel, tmp_path: Path) -> Path:
    config = ScenesDataConfig(size=16, num_train=7, num_validation=3, flip=True)
    splits = {split: open_dataset(config, split) for split in ("train", "validation")}
    write_codes(tokenizer, splits, tmp_path / "codes", views=3, batch_size=2, shard_size=4)
    return tmp_path / "codes"


def test_stored_codes_are_those_of_the_pictures(folder: Path, tokenizer: VQModel) -> None:
    scenes = open_dataset(ScenesDataConfig(size=16, num_train=7, num_validation=3), "train")
    codes = CodeDataset(folder, "train")
    assert len(codes) == 7
    assert codes.size == (16, 16)
    for row in range(7):
        batch = to_device(scenes.batch([row], [-1]), "cpu")
        sample = codes.sample(row, -1)
        assert torch.equal(sample["codes"].long(), tokenizer.encode(batch["image"])[0])
        assert torch.equal(sample["segmentation"].long(), batch["segmentation"][0])
        assert sample["label"] == batch["label"][0]
        assert sample["key"] == batch["key"][0]


def test_each_view_keeps_its_map_and_epochs_go_through_views(folder: Path) -> None:
    codes = CodeDataset(folder, "train")
    shards = list(read_shards(folder, read_index(folder), "train"))
    assert [len(entry["keys"]) for _, entry in shards] == [4, 3]
    stored = torch.cat([tensors["segmentation"] for tensors, _ in shards])
    flipped = [row for row in range(7) if not torch.equal(stored[row, 0], stored[row, 1])]
    assert flipped, "no view differs from the centred one"
    row, seen = flipped[0], set()
    for epoch in range(12):
        shown = codes.sample(row, epoch)["segmentation"]
        views = [view for view in range(3) if torch.equal(stored[row, view], shown)]
        assert views
        seen.add(views[0])
        assert torch.equal(shown, codes.sample(row, epoch)["segmentation"])
    assert len(seen) > 1


def test_each_view_keeps_its_boxes_and_its_text(folder: Path) -> None:
    codes = CodeDataset(folder, "train")
    assert list(codes.object_names) == list(CLASS_NAMES)
    stored = torch.cat([tensors["segmentation"] for tensors, _ in read_shards(folder, codes.index, "train")])
    mirrored = 0
    for row in range(7):
        for epoch in range(-1, 6):
            sample = codes.sample(row, epoch)
            views = [v for v in range(3) if torch.equal(stored[row, v], sample["segmentation"])]
            whole = codes.sample(row, -1)
            expected = whole["objects"]
            if 0 not in views:
                mirrored += 1
                expected = mirror_objects(expected)
            for found, wanted in zip(sample["objects"], expected, strict=True):
                assert found["label"] == wanted["label"]
                assert list(found["box"]) == pytest.approx(list(wanted["box"]))
            assert sample["text"] == whole["text"]
    assert mirrored > 3
    assert "under" in next(codes.texts())


def test_a_folder_of_before_tells_the_same_of_every_view(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    del index["told_by_view"], index["object_names"]
    for shards in index["splits"].values():
        for entry in shards:
            for name in ("text", "objects"):
                entry[name] = [views[0] for views in entry[name]]
    expected = CodeDataset(folder, "train").sample(2, -1)
    (folder / "index.json").write_text(json.dumps(index))
    codes = CodeDataset(folder, "train")
    for epoch in range(5):
        assert codes.sample(2, epoch)["objects"] == expected["objects"]
        assert codes.sample(2, epoch)["text"] == expected["text"]


def test_the_loader_reads_them_like_pictures(folder: Path) -> None:
    batch = to_device(next(train_batches(CodeDataset(folder, "train"), batch_size=4, seed=0))[0], "cpu")
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].shape == (4, 8, 8)
    assert batch["segmentation"].shape == (4, 16, 16)


def test_the_folder_holds_its_tokenizer(folder: Path, tokenizer: VQModel) -> None:
    assert read_index(folder).tokenizer_hash == tokenizer.codes_hash()
    assert VQModel.from_pretrained(folder / "tokenizer").content_hash() == tokenizer.content_hash()


def test_a_folder_in_use_is_left_alone(tokenizer: VQModel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        write_codes(
            tokenizer, {"train": open_dataset(ScenesDataConfig(size=16, num_train=1), "train")}, tmp_path
        )


def test_a_size_that_does_not_fit_is_told_before_anything_is_written(
    tokenizer: VQModel, tmp_path: Path
) -> None:
    odd = open_dataset(ScenesDataConfig(size=17, num_train=1), "train")
    with pytest.raises(UserError, match="height 17 is not divisible"):
        write_codes(tokenizer, {"train": odd}, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_damage_is_refused_by_name(folder: Path) -> None:
    shard = folder / "train-00000.safetensors"
    tensors, written = load_file(shard), shard.read_bytes()
    shard.write_bytes(written[:-1])
    with pytest.raises(DataError, match=rf"has {len(written) - 1} bytes, not the {len(written)}"):
        CodeDataset(folder, "train")
    shard.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(DataError, match="other bytes than"):
        CodeDataset(folder, "train")
    # Folders of before have neither sizes nor hashes, and load.
    index = json.loads((folder / "index.json").read_text())
    for entry in index["splits"]["train"]:
        assert entry.pop("size") > 0
        del entry["sha256"]
    (folder / "index.json").write_text(json.dumps(index))
    shard.write_bytes(written)
    assert len(CodeDataset(folder, "train")) == 7
    shard.write_bytes(written[:-1])
    with pytest.raises(DataError, match="cannot be read"):
        CodeDataset(folder, "train")
    save_file({**tensors, "codes": tensors["codes"] + 16}, shard)
    with pytest.raises(DataError, match=r"train-00000.*outside \[0, 16\)"):
        CodeDataset(folder, "train")
    save_file({**tensors, "codes": tensors["codes"][:1].clone()}, shard)
    with pytest.raises(DataError, match="does not hold the 4 samples"):
        CodeDataset(folder, "train")
    shard.unlink()
    with pytest.raises(DataError, match="not there"):
        CodeDataset(folder, "train")


def test_an_index_cannot_lead_out_of_its_folder(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / "train-00000.safetensors").read_bytes())
    index["splits"]["train"][0]["file"] = "../elsewhere.safetensors"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not there"):
        CodeDataset(folder, "train")


def test_what_is_no_folder_of_codes_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="taming vq encode"):
        CodeDataset(tmp_path, "train")


def test_pictures_are_kept_where_asked_for(tokenizer: VQModel, tmp_path: Path) -> None:
    config = ScenesDataConfig(size=16, crop_from=24, num_train=5, num_validation=2, flip=True)
    splits = {split: open_dataset(config, split) for split in ("train", "validation")}
    write_codes(tokenizer, splits, tmp_path / "codes", views=2, keep=["image"], batch_size=2)
    codes = CodeDataset(tmp_path / "codes", "train")
    assert {"image", "crop", "codes"} <= codes.provides
    assert {"image", "crop"} <= set(read_index(tmp_path / "codes").provides)
    assert codes.columns["image"].dtype == torch.uint8
    for row in range(5):
        for view, epoch in ((0, -1), (1, 0)):
            whole = splits["train"].sample(row, epoch)
            for name in ("image", "crop", "segmentation"):
                assert torch.equal(codes.columns[name][row, view].to(whole[name].dtype), whole[name]), name
    batch = to_device(codes.batch([0, 1], [-1, -1]), "cpu")
    assert batch["image"].dtype == torch.float32
    assert torch.equal(tokenizer.encode(batch["image"]), batch["codes"])

    with pytest.raises(UserError, match=r"condition_image shall be kept, but the data gives crop, depth"):
        write_codes(tokenizer, splits, tmp_path / "other", keep=["condition_image"])
    with pytest.raises(UserError, match="'edges' cannot be kept beside codes"):
        write_codes(tokenizer, splits, tmp_path / "other", keep=["edges"])
    assert not (tmp_path / "other").exists()


def test_pictures_that_go_bad_are_left_out_and_the_folder_is_whole_or_absent(
    tokenizer: VQModel, tmp_path: Path
) -> None:
    for n in range(6):
        noise = torch.randint(256, (16, 16, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / f"{n}.png")
    config = FolderDataConfig(root=tmp_path, size=16, validation_fraction=0, skip_budget=0.2)
    dataset = open_dataset(config, "train")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:400])
    with pytest.warns(UserWarning, match=r"left 1 truncated out of 6 pictures; first truncated: .*2\.png"):
        index = write_codes(tokenizer, {"train": dataset}, tmp_path / "codes", views=2, batch_size=4)
    assert index.splits["train"][0]["keys"] == ["0", "1", "3", "4", "5"]
    assert len(CodeDataset(tmp_path / "codes", "train")) == 5
    (tmp_path / "4.png").unlink()
    with pytest.raises(DataError, match="2 of 6 pictures cannot be used"):
        write_codes(tokenizer, {"train": dataset}, tmp_path / "others")
    assert not (tmp_path / "others").exists()
    assert [path.name for path in tmp_path.iterdir() if "others" in path.name] == []
