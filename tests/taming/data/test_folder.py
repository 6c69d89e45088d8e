from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from taming.config import build_config
from taming.data.batch import validate_batch
from taming.data.config import FolderDataConfig
from taming.data.dataset import PictureDataset, open_dataset
from taming.data.folder import list_pictures
from taming.data.loader import evaluation_batches, train_batches
from taming.errors import ConfigError, DataError

SHARED = Path(__file__).resolve().parents[3] / "../shared/data"


def write(path: Path, size: tuple[int, int] = (40, 32), value: int = 0, mode: str = "RGB") -> None:
    """A picture of (H, W) with one value all over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        Image.fromarray(np.full(size, value, np.uint16)).save(path)
    else:
        Image.new(mode, (size[1], size[0]), value if mode == "L" else (value,) * 3).save(path)


def opened(root: Path, split: Any = "train", **options: Any) -> PictureDataset:
    return open_dataset(
        FolderDataConfig(root=root, **{"size": 32, "validation_fraction": 0.0, **options}), split
    )


def keys(dataset: PictureDataset) -> list[str]:
    return [dataset.sample(n, -1)["key"] for n in range(len(dataset))]


def test_a_flat_folder_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "deep/er/c.webp"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    dataset = opened(tmp_path)
    assert keys(dataset) == ["a", "b", "deep/er/c"]
    assert dataset.provides == {"image", "crop", "key"}
    assert dataset.num_classes == dataset.num_labels == 0
    assert [path.name for path in list_pictures(tmp_path)] == ["a.JPG", "b.png", "c.webp"]
    sample = dataset.sample(0, -1)
    assert sample["image"].shape == (3, 32, 32)
    assert sample["image"].dtype == torch.uint8


def test_links_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "root")
    assert keys(opened(tmp_path / "root")) == ["link/a"]


def test_maps_are_paired_by_name_whatever_their_suffix(tmp_path: Path) -> None:
    for n, name in enumerate(("x/one", "x/two.5", "y/three")):
        write(tmp_path / f"images/{name}.jpg", value=60 * n)
        write(tmp_path / f"labels/{name}.png", value=n, mode="L")
        write(tmp_path / f"depth/{name}.tif", size=(80, 64), value=20000 * n, mode="I;16")
        write(tmp_path / f"edges/{name}.webp", value=60 * n)
    dataset = opened(
        tmp_path,
        segmentation="labels",
        num_labels=3,
        depth="depth",
        condition_image="edges",
        class_labels=True,
    )
    assert dataset.provides == {"image", "segmentation", "depth", "condition_image", "label", "crop", "key"}
    assert dataset.class_names == ["x", "y"]
    assert dataset.num_labels == 3
    assert keys(dataset) == ["x/one", "x/two.5", "y/three"]
    for n in range(3):
        sample = dataset.sample(n, 4)
        assert abs(int(sample["image"].float().mean()) - 60 * n) <= 3
        assert (sample["segmentation"] == n).all()
        assert torch.allclose(sample["depth"], torch.tensor(20000 * n / 65535))
        assert abs(int(sample["condition_image"].float().mean()) - 60 * n) <= 3
        assert sample["label"] == (0, 0, 1)[n]
    (batch,) = next(train_batches(dataset, batch_size=3, seed=0))
    validate_batch(batch, dataset.provides)


def test_augmentation_is_a_function_of_seed_epoch_and_key(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    for name in ("a", "b"):
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    dataset = opened(tmp_path, random_scale=[1.0, 1.5], resize=40)
    images = {
        (index, epoch, seed): dataset.sample(index, epoch, seed=seed)["image"]
        for index in (0, 1)
        for epoch in (0, 1)
        for seed in (0, 1)
    }
    assert len({image.numpy().tobytes() for image in images.values()}) == 8
    assert torch.equal(
        images[0, 1, 1], opened(tmp_path, random_scale=[1.0, 1.5], resize=40).sample(0, 1, seed=1)["image"]
    )
    assert torch.equal(dataset.sample(0, -1)["image"], dataset.sample(1, -1)["image"])
    still = opened(tmp_path, crop="center", flip=False)
    assert torch.equal(still.sample(0, 3)["image"], still.sample(0, -1)["image"])


def test_the_crop_tells_where_the_frame_lies(tmp_path: Path) -> None:
    """In a ramp from 0 to 255 along x, colours are places."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8), (64, 256))
    Image.fromarray(ramp).convert("RGB").save(tmp_path / "a.png")
    dataset = opened(tmp_path, size=64, flip=True)
    flipped = 0
    for epoch in range(12):
        sample = dataset.sample(0, epoch)
        x0, y0, x1, y1 = sample["crop"].tolist()
        row = sample["image"][0, 0].float()
        mirrored = bool(row[0] > row[-1])
        flipped += mirrored
        ends = (1 - x0, 1 - x1) if mirrored else (x0, x1)
        assert float(row[0]) / 256 == pytest.approx(ends[0], abs=0.02)
        assert float(row[-1]) / 256 == pytest.approx(ends[1], abs=0.02)
        assert (y0, y1) == (0.0, 1.0)
    assert 0 < flipped < 12
    assert dataset.sample(0, -1)["crop"].tolist() == pytest.approx([0.375, 0, 0.625, 1])


def test_the_split_is_stable_and_never_empty(tmp_path: Path) -> None:
    for n in range(60):
        write(tmp_path / f"{n}.png")

    def split(fraction: float) -> tuple[set[str], set[str]]:
        options = {"validation_fraction": fraction}
        return set(keys(opened(tmp_path, **options))), set(keys(opened(tmp_path, "validation", **options)))

    train, validation = split(0.2)
    assert train | validation == {str(n) for n in range(60)}
    assert not train & validation
    assert 4 <= len(validation) <= 22
    for n in range(60, 90):
        write(tmp_path / f"{n}.jpg")
    later_train, later_validation = split(0.2)
    assert train < later_train
    assert validation < later_validation
    assert validation <= split(0.4)[1]
    assert split(0.0)[1] == set()
    assert len(split(1e-9)[1]) == 1
    for n in range(2, 90):
        (tmp_path / f"{n}.png").unlink(missing_ok=True)
        (tmp_path / f"{n}.jpg").unlink(missing_ok=True)
    for fraction in (1e-9, 0.5, 0.999):
        assert [len(part) for part in split(fraction)] == [1, 1]
    (tmp_path / "1.png").unlink()
    assert [len(part) for part in split(0.5)] == [1, 0]


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    for n in range(3):
        write(tmp_path / f"{n}.png")
    first = opened(tmp_path).fingerprint()
    assert first == opened(tmp_path, flip=False).fingerprint()
    write(tmp_path / "2.png", size=(41, 32))
    second = opened(tmp_path).fingerprint()
    write(tmp_path / "3.png")
    assert len({first, second, opened(tmp_path).fingerprint()}) == 3


def refused(message: str, root: Path, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        opened(root, **options)
    assert "\n" not in str(error.value)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    refused(r"nowhere does not exist; give a folder .*data\.root=DIR", tmp_path / "nowhere")
    write(tmp_path / "a.png")
    refused(r"is a file, not a folder", tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").write_text("")
    refused(r"no pictures in .*empty \(1 other files\)", tmp_path / "empty")
    refused(
        r"data\.images: there is no folder .*pics; data\.root has the folders empty", tmp_path, images="pics"
    )
    refused(r"set data\.images to the folder", tmp_path, depth="empty")
    write(tmp_path / "images/a.png")
    refused(
        r"data\.depth: there is no folder .*dpth; data\.root has the folders empty, images",
        tmp_path,
        depth="dpth",
    )


def test_pictures_smaller_than_the_crop_are_named(tmp_path: Path) -> None:
    write(tmp_path / "large.png", size=(80, 80))
    write(tmp_path / "small.png", size=(30, 40))
    write(tmp_path / "thin.png", size=(200, 20))
    refused(
        r"small\.png is 40x30, smaller than the crop 64x64 \(and 1 more\); set data\.upscale=true, or"
        r" data\.size=20, or remove it",
        tmp_path,
        size=64,
    )
    assert opened(tmp_path, size=64, upscale=True).sample(1, 0)["image"].shape == (3, 64, 64)
    assert len(opened(tmp_path, size=20)) == 3
    refused(r"thin\.png is 20x200, smaller than the crop 30x20", tmp_path, size=[20, 30])


def test_maps_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"images/{name}.png")
        write(tmp_path / f"maps/{name}.png", mode="L", value=2)
    options: dict[str, Any] = {"segmentation": "maps", "num_labels": 3}
    assert len(opened(tmp_path, **options)) == 3

    (tmp_path / "maps/b.png").rename(tmp_path / "b.png")
    refused(
        r"images/b\.png has no map in .*maps \(looked for b\.\*\); add the map, remove", tmp_path, **options
    )
    (tmp_path / "b.png").rename(tmp_path / "maps/b.png")

    write(tmp_path / "maps/stray.png", mode="L")
    refused(
        r"maps/stray\.png has no picture in .*images .*; add the picture or remove the map",
        tmp_path,
        **options,
    )
    (tmp_path / "maps/stray.png").unlink()

    write(tmp_path / "maps/c.png", size=(32, 40), mode="L")
    refused(
        r"maps/c\.png is 40x32, but its picture .*c\.png is 32x40: the aspects differ", tmp_path, **options
    )

    write(tmp_path / "maps/c.png", mode="L", value=200)
    refused(
        r"maps/c\.png holds label 200, but data\.num_labels is 3; set data\.num_labels=201, or give such"
        r" pixels a label below 3",
        tmp_path,
        **options,
    )
    write(tmp_path / "maps/c.png", mode="RGB")
    refused(r"maps/c\.png is a picture in mode RGB, not a label map", tmp_path, **options)
    write(tmp_path / "maps/c.tif", mode="L")
    refused(r"differ only in their suffix", tmp_path, **options)


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    write(tmp_path / "cats/a.png")
    write(tmp_path / "loose.png")
    refused(r"loose\.png lies in no class folder; .*data\.class_labels=false", tmp_path, class_labels=True)
    refused(r"a\.png has 32x40 pixels, more than data\.max_pixels = 1000", tmp_path, max_pixels=1000)
    write(tmp_path / "loose.jpg")
    refused(r"loose\.jpg and .*loose\.png differ only in their suffix", tmp_path)
    (tmp_path / "loose.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "loose.png").unlink()
    refused(r"loose\.jpg .*(damaged|cannot be read)", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentation": "labels"}, "needs num_labels"),
        ({"resize": 16}, "resize 16 is less than the crop 32"),
        ({"random_scale": [1.5, 1.0]}, "lowest <= highest"),
        ({"size": [1, 2, 3]}, "size"),
        ({"sise": 3}, "unknown key sise; did you mean size"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_configs_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(FolderDataConfig, {"root": ".", "size": 32, **options})
    with pytest.raises(ValidationError):
        FolderDataConfig(**{"root": ".", "size": 32, **options})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared pictures are not here")
@pytest.mark.parametrize(
    ("folder", "options", "total"),
    [
        ("photos", {"size": 64}, 200),
        ("segmentation", {"segmentation": "labels", "num_labels": 151, "size": [64, 96]}, 30),
        ("depth", {"depth": "depth", "class_labels": True, "size": 64}, 25),
    ],
)
def test_real_pictures_as_they_are(folder: str, options: dict[str, Any], total: int) -> None:
    options["validation_fraction"] = 0.1
    train = opened(SHARED / folder, **options)
    validation = opened(SHARED / folder, "validation", **options)
    assert len(train) + len(validation) == total
    assert len(validation) >= 1
    for step in islice(train_batches(train, batch_size=8, seed=0), 3):
        validate_batch(step[0], train.provides)
        if "depth" in step[0]:
            assert 0 <= step[0]["depth"].min() < step[0]["depth"].max() <= 1
    assert sum(len(batch["key"]) for batch in evaluation_batches(validation, batch_size=8)) == len(validation)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared pictures are not here")
def test_real_maps_with_too_few_labels_declared() -> None:
    refused(
        r"holds label \d+, but data\.num_labels is 50; set data\.num_labels=1\d\d",
        SHARED / "segmentation",
        segmentation="labels",
        num_labels=50,
    )
