"""Conditions that are pictures, alone and combined: what the contract of all conditions does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from stage1_vq import VQModel
from stage1_vq.codes import write_codes
from stage2_ar.codes import CodeDataset
from stage2_ar.conditions import build_condition
from stage2_ar.conditions.combined import CombinedCondition
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CombinedConditionConfig,
    ConditionConfig,
    DepthConditionConfig,
    ImageConditionConfig,
    SegmentationConditionConfig,
)
from taming.config import Config, build_config
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.dataset import open_dataset
from taming.data.edges import canny
from taming.errors import ConfigError, UserError
from taming.types import Batch

WIDTH = 16
EDGES = ImageConditionConfig(source="edges", hidden_width=8)


def low(scale: int, **options: Any) -> ImageConditionConfig:
    return ImageConditionConfig(source="low_resolution", scale=scale, hidden_width=8, **options)


def built(config: Any, factor: int = 4) -> Any:
    torch.manual_seed(0)
    return build_condition(config, width=WIDTH, downsample_factor=factor).eval()


class Holder(Config):
    condition: ConditionConfig


def test_saved_segmentation_models_keep_their_names() -> None:
    condition = built(SegmentationConditionConfig(num_labels=3, context_layers=1))
    block = {f"context.0.{name}.{kind}" for name in ("norm", "conv") for kind in ("weight", "bias")}
    linear = {f"{name}.{kind}" for name in ("patch", "norm", "out") for kind in ("weight", "bias")}
    assert set(condition.state_dict()) == {
        "label_embedding.weight",
        "start",
        "null_embedding",
        *block,
        *linear,
    }


def test_a_low_resolution_is_the_mean_of_pixels() -> None:
    condition = built(low(2))
    image = torch.rand(2, 3, 8, 12) * 2 - 1
    derived = condition.derive({"image": image})["low_resolution"]
    assert torch.allclose(
        derived, rearrange(image, "b c (h p) (w q) -> b c h w p q", p=2, q=2).mean((-1, -2))
    )
    own = torch.zeros(2, 3, 4, 6)
    assert condition.derive({"image": image, "low_resolution": own})["low_resolution"] is own
    batch = {"low_resolution": derived}
    assert torch.equal(condition.pixels(batch, (2, 3)), rearrange(derived, "b c h w -> b h w c"))
    assert torch.equal(condition(batch, (2, 3)).cells, condition({"image": image}, (2, 3)).cells)


@pytest.mark.parametrize(
    ("factor", "scale", "pixels"),
    [(4, 2, 2), (4, 4, 1), (16, 4, 4), (4, 8, 1), (4, 3, 2), (4, 16, 1), (8, 3, 3)],
)
def test_any_scale_fits_any_grid(factor: int, scale: int, pixels: int) -> None:
    """Pixels a cell are whole: what falls between is enlarged, and lies where it lay."""
    condition = built(low(scale), factor)
    grid = (3 * scale, 2 * scale)
    assert condition.patch_size == pixels
    height, width = grid[0] * factor, grid[1] * factor
    # A ramp from left to right stays one, whatever it is resampled to.
    ramp = ((torch.arange(width) + 0.5) / width * 2 - 1).expand(1, 3, height, width)
    batch = condition.derive({"image": ramp})
    assert batch["low_resolution"].shape == (1, 3, height // scale, width // scale)
    seen = condition.pixels(batch, grid)
    assert seen.shape == (1, grid[0] * pixels, grid[1] * pixels, 3)
    centres = (torch.arange(seen.shape[2]) + 0.5) / seen.shape[2] * 2 - 1
    inner = slice(pixels * grid[1] // 4, -(pixels * grid[1] // 4))
    assert torch.allclose(seen[0, 0, inner, 0], centres[inner], atol=1e-5)
    assert condition(batch, grid).cells.shape == (1, *grid, WIDTH)


def test_sizes_that_cannot_be_made_small_are_refused() -> None:
    condition = built(low(3))
    with pytest.raises(UserError, match=r"16x24 pixels cannot be made 3 times smaller .*; use 12x24"):
        condition.derive({"image": torch.zeros(1, 3, 16, 24)})
    with pytest.raises(UserError, match="cannot be made 3 times smaller"):
        condition({"low_resolution": torch.zeros(1, 3, 5, 8)}, (4, 6))
    with pytest.raises(UserError, match="cannot be made 3 times smaller"):
        condition.check_data(open_dataset(ScenesDataConfig(size=16, num_train=1), "train"))


def test_edges_are_taken_alike_in_training_and_of_a_users_picture() -> None:
    condition = built(EDGES)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    derived = condition.derive({"image": image})["edges"]
    assert torch.equal(derived * 2 - 1, canny(image))
    assert set(derived.unique().tolist()) == {0, 1}
    assert torch.equal(condition.read({"image": image})["edges"], derived)
    assert torch.equal(condition.read({"image": derived})["edges"], derived)
    assert condition.read({"image": image[0]})["edges"].shape == (1, 1, 16, 16)


def test_what_data_lacks_is_told_with_the_ways_out(tokenizer: VQModel, tmp_path: Path) -> None:
    scenes = open_dataset(ScenesDataConfig(size=16, num_train=2, num_validation=1), "train")
    for config in (DepthConditionConfig(), EDGES, low(2)):
        built(config).check_data(scenes)
    with pytest.raises(UserError, match=r"needs condition_image, and the data has none; set data\.condition"):
        built(ImageConditionConfig()).check_data(scenes)

    for keep in ([], ["image"]):
        folder = tmp_path / f"codes{len(keep)}"
        write_codes(tokenizer, {"train": scenes}, folder, keep=keep)
        codes = CodeDataset(folder, "train")
        built(DepthConditionConfig()).check_data(codes)
        for config in (EDGES, low(2)):
            if keep:
                built(config).check_data(codes)
                continue
            with pytest.raises(UserError, match=r"taming vq encode --keep image`, or .*data\.kind=folder"):
                built(config).check_data(codes)

    for name in ("a", "b"):
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / f"{name}.png")
    grey = open_dataset(FolderDataConfig(root=tmp_path, channels=1, size=16), "train")
    built(low(2, channels=1)).check_data(grey)
    with pytest.raises(UserError, match=r"image has 1 channels, but the low-resolution .* built for 3"):
        built(low(2)).check_data(grey)
    with pytest.raises(UserError, match=r"condition\.kind=depth needs depth, and the data has none"):
        built(DepthConditionConfig()).check_data(grey)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "image", "source": "low_resolution"}, "needs scale"),
        ({"kind": "image", "source": "edges", "scale": 2}, "scale belongs to source low_resolution"),
        ({"kind": "image", "source": "edges", "channels": 3}, "edges have one channel"),
        ({"kind": "image", "source": "sketch"}, "source"),
        ({"kind": "combined", "conditions": [{"kind": "depth"}]}, "at least 2"),
        ({"kind": "combined", "conditions": [{"kind": "depth"}, {"kind": "none"}]}, "says nothing"),
        (
            {"kind": "combined", "conditions": [{"kind": "depth"}, {"kind": "combined"}]},
            r"conditions\.1\.kind",
        ),
        ({"kind": "combined", "conditions": [{"kind": "depth"}, {"kind": "image", "scal": 4}]}, "mean scale"),
    ],
)
def test_configs_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(Holder, {"condition": values})
    assert "\n" not in str(caught.value)


def test_saved_configs_read_back() -> None:
    for config in (EDGES, low(4), CombinedConditionConfig(conditions=[DepthConditionConfig(), EDGES])):
        holder = Holder(condition=config)
        assert build_config(Holder, holder.model_dump(mode="json")) == holder


def combined(dropout: float, *parts: Any) -> CombinedCondition:
    condition = built(CombinedConditionConfig(conditions=list(parts), dropout=dropout))
    assert isinstance(condition, CombinedCondition)
    return condition


CLASS = ClassConditionConfig(num_classes=2, dropout=0.5)
DEPTH = DepthConditionConfig(dropout=0.5, hidden_width=8)


def test_parts_are_left_out_alone_and_all_together() -> None:
    condition = combined(0.2, CLASS, DEPTH)
    count, grid = 2000, (1, 1)
    batch: Batch = {
        "label": torch.zeros(count, dtype=torch.int64),
        "depth": torch.full((count, 1, 4, 4), 0.5),
    }
    whole, null = condition(batch, grid), condition.null(count, grid, "cpu")
    mixed = condition.train()(batch, grid)
    assert whole.cells is not None
    assert null.cells is not None
    assert mixed.cells is not None
    has_class = (mixed.embeddings[:, 0] == whole.embeddings[:, 0]).all(-1)
    has_depth = torch.isclose(mixed.cells, whole.cells, atol=1e-6).all(-1).flatten()
    assert torch.equal(~has_class, (mixed.embeddings[:, 0] == null.embeddings[:, 0]).all(-1))
    assert torch.equal(~has_depth, torch.isclose(mixed.cells, null.cells, atol=1e-6).all(-1).flatten())
    # All together a fifth of the time, else each by itself half of the time.
    for group, share in (
        (has_class & has_depth, 0.2),
        (has_class & ~has_depth, 0.2),
        (~has_class & has_depth, 0.2),
        (~has_class & ~has_depth, 0.4),
    ):
        assert float(group.float().mean()) == pytest.approx(share, abs=0.05)


def test_a_combination_says_what_its_parts_say() -> None:
    parts = (CLASS, DEPTH, SegmentationConditionConfig(num_labels=3, placement="prefix", hidden_width=8))
    condition, grid = combined(0.1, *parts), (2, 3)
    batch: Batch = {
        "label": torch.tensor([1, 0]),
        "depth": torch.rand(2, 1, 8, 12),
        "segmentation": torch.randint(3, (2, 8, 12)),
    }
    prefix = condition(batch, grid)
    alone = [part(batch, grid) for part in condition.members]
    assert prefix.segments == (1, 1, (2, 3))
    assert torch.equal(prefix.embeddings, torch.cat([part.embeddings for part in alone], dim=1))
    assert prefix.cells is not None
    assert torch.equal(prefix.cells, alone[1].cells)
    assert condition.keys == {"class": "label", "depth": "depth", "segmentation": "segmentation"}
    read = condition.read({"segmentation": batch["segmentation"], "class": [1, 0], "depth": batch["depth"]})
    assert torch.equal(condition(read, grid).embeddings, prefix.embeddings)
    with pytest.raises(UserError, match="2 of class, 1 of depth, 2 of segmentation"):
        condition.read({"segmentation": batch["segmentation"], "class": [1, 0], "depth": batch["depth"][0]})


def test_combinations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="two parts are given as 'image'"):
        combined(0.1, EDGES, low(2))
    always = ClassConditionConfig(num_classes=2, dropout=0)
    with pytest.raises(ConfigError, match=r"condition\.dropout 0\.1 .* but class cannot be"):
        combined(0.1, always, DEPTH)
    condition = combined(0.0, always, DEPTH)
    assert not condition.has_null
    with pytest.raises(UserError, match="without dropout"):
        condition.null(1, (1, 1), "cpu")
