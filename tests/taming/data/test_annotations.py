"""Boxes and captions that lie beside pictures: read right, carried along, and refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from taming.data.annotations import read_annotations
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.data.export import write_scenes
from taming.data.source import AllSplits
from taming.errors import DataError

DOCUMENT: dict[str, Any] = {
    # The file measures in 200x100 pixels; the pictures on disk are half as large.
    "images": [
        {"id": 7, "file_name": "train/a.jpg", "width": 200, "height": 100},
        {"id": 3, "file_name": "b.jpg", "width": 200, "height": 100},
        {"id": 9, "file_name": "elsewhere.jpg", "width": 10, "height": 10},
    ],
    "categories": [{"id": 44, "name": "vase"}, {"id": 2, "name": "cat"}],
    "annotations": [
        {"image_id": 7, "category_id": 44, "bbox": [50, 25, 50, 50]},
        {"image_id": 7, "category_id": 2, "bbox": [180, 90, 40, 40], "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"image_id": 3, "category_id": 2, "bbox": [10, 10, 0, 5]},
        {"image_id": 9, "category_id": 2, "bbox": [1, 1, 2, 2]},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (100, 50)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "captions" / f"{name}.txt").write_text(f"first of {name}\n\n  second of {name} \n")
    (tmp_path / "boxes.json").write_text(json.dumps(DOCUMENT))
    return tmp_path


def opened(root: Path, **options: Any) -> PictureDataset:
    values = {"size": 50, "validation_fraction": 0.0, "objects": "boxes.json", "text": "captions", **options}
    return open_dataset(FolderDataConfig(root=root, **values), "train")


def test_boxes_are_shares_of_the_files_own_size(root: Path) -> None:
    found = read_annotations(root / "boxes.json", ["a", "b"])
    assert found.names == ["cat", "vase"]
    assert found.objects == {
        "a": [
            {"label": 1, "box": (0.25, 0.25, 0.5, 0.75)},
            {"label": 0, "box": (0.9, 0.9, 1.0, 1.0)},
        ],
        "b": [],
    }
    assert found.skipped == {"pictures not at hand": 1, "crowds": 1, "boxes without area": 1}
    with_crowds = read_annotations(root / "boxes.json", ["a", "b"], crowds=True)
    assert with_crowds.objects["a"][2]["box"] == (0, 0, 1, 1)


def test_names_in_folders_are_found_by_their_last_part_where_it_is_the_only_one(root: Path) -> None:
    found = read_annotations(root / "boxes.json", ["deep/er/a", "b"])
    assert len(found.objects["deep/er/a"]) == 2
    with pytest.raises(DataError, match="does not list the picture x/b"):
        read_annotations(root / "boxes.json", ["a", "x/b", "y/b"])


def test_a_centre_crop_clips_and_drops(root: Path) -> None:
    dataset = opened(root)
    assert dataset.provides >= {"objects", "text"}
    assert dataset.num_object_classes == 2
    sample = dataset.sample(0, -1)
    # The crop shows x in [0.25, 0.75]: half of the width. The vase begins at its edge, the cat is outside.
    assert sample["objects"] == [{"label": 1, "box": (0.0, 0.25, 0.5, 0.75)}]
    assert dataset.sample(1, -1)["objects"] == []
    assert dataset.notes == [
        f"left out of {root / 'boxes.json'}: 1 pictures not at hand, 1 crowds, 1 boxes without area"
    ]
    batch = dataset.batch([0, 1], [-1, 0])
    assert [len(objects) for objects in batch["objects"]] == [1, 0]


def test_boxes_follow_the_crop_and_the_mirror(root: Path) -> None:
    picture = Image.new("RGB", (100, 50))
    picture.paste((255, 255, 255), (25, 12, 50, 38))  # the vase
    picture.save(root / "images" / "a.png")
    dataset = opened(root, size=[20, 30], random_scale=[1.0, 2.0], least_visible=0.0)
    mirrored = 0
    for epoch in range(12):
        sample = dataset.sample(0, epoch)
        lit = (sample["image"][0] > 127).nonzero()
        vases = [item["box"] for item in sample["objects"] if item["label"] == 1]
        if not len(lit):
            assert not vases or min(vases[0][2] - vases[0][0], vases[0][3] - vases[0][1]) < 0.06
            continue
        (top, left), (bottom, right) = lit.min(0).values.tolist(), (lit.max(0).values + 1).tolist()
        shown = (left / 30, top / 20, right / 30, bottom / 20)
        assert all(abs(a - b) < 0.06 for a, b in zip(shown, vases[0], strict=True)), (epoch, shown, vases)
        mirrored += sample["crop"][0] != 1 - sample["crop"][2]
    assert mirrored


def test_what_a_crop_hides_too_much_of_is_dropped(root: Path) -> None:
    for least, kept in ((0.3, 1), (0.6, 0)):
        # The crop shows the right half of the vase.
        document = copy.deepcopy(DOCUMENT)
        document["annotations"][0]["bbox"] = [25, 25, 50, 50]
        (root / "boxes.json").write_text(json.dumps(document))
        assert len(opened(root, least_visible=least).sample(0, -1)["objects"]) == kept


def test_epochs_go_through_captions_and_validation_shows_the_first(root: Path) -> None:
    dataset = opened(root)
    assert dataset.sample(0, -1)["text"] == "first of a"
    seen = [dataset.sample(0, epoch)["text"] for epoch in range(20)]
    assert set(seen) == {"first of a", "second of a"}
    assert seen == [dataset.sample(0, epoch)["text"] for epoch in range(20)]
    assert seen != [dataset.sample(0, epoch, seed=1)["text"] for epoch in range(20)]
    assert list(dataset.texts()) == ["first of a", "second of a", "first of b", "second of b"]
    assert list(AllSplits([dataset]).texts()) == list(dataset.texts())


def test_cocos_captions(root: Path) -> None:
    captions = [
        {"image_id": 3, "caption": " a cat\non a mat "},
        {"image_id": 7, "caption": "a vase"},
        {"image_id": 9, "caption": "not at hand"},
    ]
    (root / "captions.json").write_text(json.dumps({"images": DOCUMENT["images"], "annotations": captions}))
    assert list(opened(root, text="captions.json").texts()) == ["a vase", "a cat on a mat"]


def test_the_fingerprint_covers_boxes_names_and_captions(root: Path) -> None:
    prints = {opened(root, objects=None, text=None).fingerprint(), opened(root).fingerprint()}
    assert opened(root).fingerprint() in prints
    document = copy.deepcopy(DOCUMENT)
    document["annotations"][0]["bbox"][0] = 51
    (root / "boxes.json").write_text(json.dumps(document))
    prints.add(opened(root).fingerprint())
    document["categories"][0]["name"] = "jug"
    (root / "boxes.json").write_text(json.dumps(document))
    prints.add(opened(root).fingerprint())
    (root / "captions" / "a.txt").write_text("another")
    prints.add(opened(root).fingerprint())
    assert len(prints) == 5


def _changed(where: str, value: Any) -> str:
    document = copy.deepcopy(DOCUMENT)
    *parents, last = where.split(".")
    node: Any = document
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    node[int(last) if last.isdigit() else last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "holds a list at its top"),
        ("{}", "has no list 'categories'"),
        (_changed("categories", []), "has no categories"),
        (_changed("categories.1.id", 44), "two categories of one id"),
        (_changed("categories.0.name", None), r"entry 0 of categories has name = None; it must be a str"),
        (_changed("images.0.id", "7"), "entry 0 of images has id = '7'; it must be a int"),
        (_changed("images.0.id", True), "id = True"),
        (_changed("images.0", 5), "entry 0 of images is a int"),
        (_changed("images.1.file_name", "a.png"), "lists a.png or its id 3 twice"),
        (_changed("images.1.file_name", "c.png"), "does not list the picture b among its images"),
        (_changed("images.0.width", 0), "has the size 0x100; give `width` and `height`"),
        (_changed("annotations.0.category_id", 5), "annotation 0 has the category 5"),
        (_changed("annotations.0.bbox", [1, 2, 3]), r"bbox \[1, 2, 3\] of annotation 0"),
        (_changed("annotations.0.bbox", [1, 2, 3, "x"]), r"is not \[left, top, width, height\]"),
        (_changed("annotations.0.bbox.2", float("nan")), r"bbox \[50, 25, nan, 50\]"),
        (_changed("annotations.0.bbox", None), "bbox = None"),
        (_changed("annotations.0.bbox.2", 10**400), "of annotation 0 is not"),
        (_changed("images.0.file_name", ""), "does not list the picture a among its images"),
        (_changed("annotations.0.image_id", [7]), r"image_id = \[7\]; it must be a int"),
    ],
)
def test_bad_annotations_are_named(root: Path, text: str, message: str) -> None:
    (root / "boxes.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        opened(root)
    assert "\n" not in str(caught.value)


def test_missing_files_and_captions_are_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*none\.json"):
        opened(root, objects="none.json")
    with pytest.raises(DataError, match=r"data\.text: .*nowhere is neither a folder"):
        opened(root, text="nowhere")
    with pytest.raises(DataError, match=r"annotation 0 has no caption"):
        opened(root, text="boxes.json")
    (root / "captions" / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match="picture b has no caption"):
        opened(root)
    (root / "captions" / "a.txt").unlink()
    with pytest.raises(DataError, match=r"picture a has no caption in .* \(and 1 more\)"):
        opened(root)
    (root / "captions" / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        opened(root)


def test_the_scenes_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    list(write_scenes(tmp_path, 5, size=(32, 32), seed=0))
    options: dict[str, Any] = {"objects": "objects.json", "text": "captions", "validation_fraction": 0.0}
    read = open_dataset(FolderDataConfig(root=tmp_path, size=32, **options), "train")
    drawn = open_dataset(ScenesDataConfig(size=32, num_train=5, seed=0), "train")
    assert list(read.object_names) == list(drawn.object_names)
    for index in range(5):
        ours, theirs = read.sample(index, -1), drawn.sample(index, -1)
        assert ours["text"] == theirs["text"]
        assert [item["label"] for item in ours["objects"]] == [item["label"] for item in theirs["objects"]]
        for a, b in zip(ours["objects"], theirs["objects"], strict=True):
            assert a["box"] == pytest.approx(b["box"])


def test_every_word_of_the_scenes_is_told() -> None:
    scenes = open_dataset(ScenesDataConfig(size=16, num_train=60), "train")
    spoken = {word for index in range(60) for word in scenes.sample(index, -1)["text"].split()}
    told = {word for text in scenes.texts() for word in text.split()}
    assert {word.strip(",") for word in spoken} <= told
