"""Every kind of input: what the model is given, what it is measured by, and mistakes by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage1_vq.evaluate import evaluate_tokenizer
from stage1_vq.inputs import as_picture, check_input, data_for, model_input, one_hot
from stage1_vq.pictures import numbered_inputs, save_restored
from stage1_vq.task import VQTask
from stage1_vq.train import describe, train
from taming.config import build_config
from taming.data.batch import to_device
from taming.data.channels import read_pixels
from taming.data.config import ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.data.picture import read_depth, read_labels
from taming.errors import ConfigError, DataError, UserError
from tests.conftest import TINY_MODEL, TINY_TRAINING, vq_config

LABELS = 7


def model_values(kind: str, in_channels: int, **changes: Any) -> dict[str, Any]:
    return {**TINY_MODEL, "input": kind, "in_channels": in_channels, **changes}


def model_config(kind: str, in_channels: int, **changes: Any) -> VQModelConfig:
    return build_config(VQModelConfig, model_values(kind, in_channels, **changes))


def settings(kind: str, in_channels: int, **changes: Any) -> Any:
    values: dict[str, Any] = {"model": model_values(kind, in_channels)}
    if kind == "segmentation":
        values |= {"loss": {"reconstruction": "bce", "perceptual_weight": 0}, "discriminator": None}
    return vq_config(**values | changes)


@pytest.fixture
def scenes() -> dict:
    config = ScenesDataConfig(size=16, num_train=4, num_validation=4, cache=False)
    return to_device(open_dataset(config, "train").batch(range(4), [-1] * 4), "cpu")


@pytest.mark.parametrize(
    ("kind", "channels"), [("image", 3), ("segmentation", LABELS), ("depth", 1), ("edges", 1)]
)
def test_the_scenes_of_every_kind(scenes: dict, kind: Any, channels: int) -> None:
    config = model_config(kind, channels)
    inputs = model_input(scenes, config)
    assert inputs.shape == (4, channels, 16, 16)
    assert inputs.dtype == torch.float32
    low = 0 if kind == "segmentation" else -1
    assert inputs.min() >= low
    assert inputs.max() <= 1
    shown = as_picture(inputs, config)
    assert shown.shape in ((4, 3, 16, 16), (4, 1, 16, 16))
    assert shown.abs().max() <= 1
    check_input(config, ScenesDataConfig().gives)


def test_one_hot_maps_say_their_labels_and_refuse_others(scenes: dict) -> None:
    labels = scenes["segmentation"]
    maps = one_hot(labels, LABELS)
    assert torch.equal(maps.argmax(1), labels)
    assert torch.equal(maps.sum(1), torch.ones(4, 16, 16))
    with pytest.raises(DataError, match=r"labels lie in \[0, 6\]; this tokenizer has labels 0 to 3"):
        one_hot(labels % LABELS * 0 + torch.arange(16) % LABELS, 4)


def test_a_tokenizer_of_labels_takes_maps_and_one_hot(scenes: dict) -> None:
    torch.manual_seed(0)
    model = VQModel(model_config("segmentation", LABELS)).eval()
    codes = model.encode(scenes["segmentation"])
    assert torch.equal(codes, model.encode(one_hot(scenes["segmentation"], LABELS)))
    assert model.decode(codes).shape == (4, LABELS, 16, 16)
    with pytest.raises(UserError, match=r"or labels \(B, H, W\) int64"):
        model.encode(scenes["image"])


def test_the_saved_facts_name_the_input(tmp_path: Path) -> None:
    import json

    VQModel(model_config("segmentation", LABELS)).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())["facts"]
    assert (facts["input"], facts["in_channels"], facts["pixel_range"]) == ("segmentation", LABELS, [0, 1])
    assert VQModel.from_pretrained(tmp_path).config.input == "segmentation"


@pytest.mark.parametrize(("kind", "channels"), [("segmentation", LABELS), ("depth", 1), ("edges", 1)])
def test_training_and_evaluation_say_the_same(tmp_path: Path, kind: str, channels: int) -> None:
    config = settings(kind, channels)
    result = train(config, tmp_path / "run")
    model = VQModel.from_pretrained(result.model)
    assert model.config.input == kind
    measured = evaluate_tokenizer(model, open_dataset(config.data, "validation"), batch_size=3)
    assert measured.figures.pop("pictures") == 6
    assert measured.figures.keys() == result.figures.keys()
    for name, value in measured.figures.items():
        assert value == pytest.approx(result.figures[name], rel=1e-5), name
    names = ("pixel_accuracy", "mean_iou") if kind == "segmentation" else ("psnr", "ssim", "l1")
    assert tuple(measured.rows) == names
    for values in measured.rows.values():
        assert len(values) == 6


def test_labels_are_learned(scenes: dict) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    task = VQTask(settings("segmentation", LABELS, training={**TINY_TRAINING, "ema_decay": None}))
    task.prepare(Accelerator(cpu=True), 100)
    before = task.evaluate([scenes])
    logs = [task.train_step([scenes], step) for step in range(100)]
    after = task.evaluate([scenes])
    assert logs[-1]["rec"] < 0.5 * logs[0]["rec"]
    assert after["pixel_accuracy"] > before["pixel_accuracy"] + 0.2
    preview = task.preview(scenes)
    assert preview.shape[0] == 3


@pytest.mark.parametrize(
    ("kind", "channels", "changes", "message"),
    [
        ("image", 3, {"loss": {"reconstruction": "bce", "perceptual_weight": 0}}, "set it to l1 or l2"),
        ("segmentation", 7, {"loss": {"perceptual_weight": 0}}, "set it to bce"),
        ("segmentation", 7, {"loss": {"reconstruction": "bce"}}, "no perceptual loss"),
        ("segmentation", 7, {"discriminator": {}}, "set discriminator to null"),
        ("depth", 3, {}, "depth has one channel, not 3"),
        ("edges", 2, {}, "edges has one channel, not 2"),
    ],
)
def test_configs_that_make_no_sense(kind: str, channels: int, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(kind, channels, **changes)


@pytest.mark.parametrize(
    ("kind", "channels", "message"),
    [
        ("segmentation", 9, "in_channels is 9, but the data has 7 labels"),
        ("condition_image", 3, "condition_image needs condition_image, but the data gives image, segm"),
        ("image", 1, r"in_channels is 1, but the data's pictures have 3 channels \(data.channels\)"),
    ],
)
def test_data_that_do_not_suit(kind: str, channels: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        describe(settings(kind, channels))


def write_grey(folder: Path, values: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        Image.fromarray(values).save(folder / f"{number}.png")


def test_a_plain_folder_is_read_as_what_the_tokenizer_was_trained_on(tmp_path: Path) -> None:
    labels = (np.arange(20 * 24).reshape(20, 24) % 5).astype(np.uint8)
    write_grey(tmp_path / "maps", labels)
    write_grey(tmp_path / "far", np.full((20, 24), 65535, np.uint16))
    config = model_config("segmentation", 5)
    inputs = list(numbered_inputs(str(tmp_path / "maps"), None, config))
    assert [(total, key) for total, key, _ in inputs] == [(3, "0"), (3, "1"), (3, "2")]
    assert np.array_equal(inputs[0][2].argmax(0), labels)
    assert inputs[0][2].shape == (5, 20, 24)
    sized = list(numbered_inputs(str(tmp_path / "maps"), (16, 16), config))
    assert sized[0][2].shape == (5, 16, 16)
    with pytest.raises(DataError, match=r"0\.png holds label 4; this tokenizer has labels 0 to 3"):
        list(numbered_inputs(str(tmp_path / "maps"), None, model_config("segmentation", 4)))

    depth = data_for(model_config("depth", 1), str(tmp_path / "far"), size=16)
    batch = to_device(open_dataset(depth, "train").batch([0], [-1]), "cpu")
    assert torch.equal(model_input(batch, model_config("depth", 1)), torch.ones(1, 1, 16, 16))
    alpha = list(numbered_inputs(str(tmp_path / "maps"), None, model_config("image", 4)))
    assert alpha[0][2].shape == (4, 20, 24)
    wide = model_config("image", 3, channel_multipliers=[1] * 6, resolution=32)
    with pytest.raises(DataError, match="smaller than one cell"):
        list(numbered_inputs(str(tmp_path / "maps"), None, wide))


def test_maps_beside_pictures_are_found(tmp_path: Path) -> None:
    write_grey(tmp_path / "images", np.zeros((20, 24), np.uint8))
    write_grey(tmp_path / "segmentation", np.full((20, 24), 3, np.uint8))
    data = data_for(model_config("segmentation", 5), str(tmp_path), size=16)
    assert data.gives == {"image": 3, "segmentation": 5}
    assert open_dataset(data, "train").sample(0, -1)["segmentation"].unique().tolist() == [3]
    for config, value in ((model_config("segmentation", 5), 1), (model_config("image", 3), -1)):
        inputs = list(numbered_inputs(str(tmp_path), None, config))
        assert [key for _, key, _ in inputs] == ["0", "1", "2"]
        assert (inputs[0][2][3 if config.in_channels == 5 else 0] == value).all()


@pytest.mark.parametrize(("channels", "levels", "size"), [(1, 2, 16), (4, 4, (16, 24)), (5, 6, (32, 64))])
def test_any_number_of_channels_factor_and_shape(
    tmp_path: Path, channels: int, levels: int, size: Any
) -> None:
    for number in range(6):
        array = np.random.default_rng(number).integers(0, 65536, (channels, 40, 70))
        np.save(tmp_path / f"{number}.npy", array.astype(np.uint16))
    frame = [size, size] if isinstance(size, int) else list(size)
    model = model_values("image", channels, channel_multipliers=[1] * levels, resolution=32)
    data = {"kind": "folder", "root": str(tmp_path), "size": frame, "channels": channels}
    config = vq_config(model=model, data=data)
    factor = 2 ** (levels - 1)
    assert f"(f{factor})" in describe(config)["latent grid"]
    result = train(config, tmp_path / "run")
    assert result.figures["psnr"] > 0
    assert VQModel.from_pretrained(result.model).spec.in_channels == channels


def test_what_is_painted_is_written_whole(tmp_path: Path) -> None:
    grid = torch.linspace(-1, 1, 12 * 14).view(1, 12, 14)
    save_restored(grid, model_config("depth", 1), tmp_path, "far")
    assert np.allclose(read_depth(tmp_path / "far.png"), (grid[0] + 1) / 2, atol=1e-5)
    labels = torch.arange(12 * 14).view(1, 12, 14) % 300
    logits = one_hot(labels, 300)[0]
    save_restored(logits, model_config("segmentation", 300), tmp_path, "a/map")
    assert np.array_equal(read_labels(tmp_path / "labels/a/map.png"), labels[0])
    assert read_pixels(tmp_path / "a/map.png", 3).shape == (3, 12, 14)
    for channels in (2, 4, 5):
        values = grid.repeat(channels, 1, 1)
        save_restored(values, model_config("image", channels), tmp_path, f"c{channels}")
        suffix = "png" if channels == 4 else "npy"
        found = read_pixels(tmp_path / f"c{channels}.{suffix}", channels)
        found = found / 127.5 - 1 if channels == 4 else found
        assert np.allclose(found, values, atol=1 / 255)
        assert (tmp_path / f"c{channels}.png").is_file()


def test_rgba_is_shown_over_white() -> None:
    config = model_config("image", 4)
    clear = torch.tensor([-1.0, -1, -1, -1]).view(1, 4, 1, 1)
    solid = torch.tensor([-1.0, 0, 1, 1]).view(1, 4, 1, 1)
    assert as_picture(clear, config).flatten().tolist() == [1, 1, 1]
    assert as_picture(solid, config).flatten().tolist() == [-1, 0, 1]
