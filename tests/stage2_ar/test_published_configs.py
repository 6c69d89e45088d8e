"""Every shipped config of stage two builds, and the published ones are what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage2_ar.conditions.config import CodesConditionConfig, ConditionTokenizerConfig
from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.model import ARModel
from stage2_ar.transformer_config import GPTConfig
from taming.config import load_config, shipped_configs

CONFIGS = sorted(shipped_configs("stage2"))
# Name: codes, layers, heads, width, positions of the block, batch.
PUBLISHED = {
    "imagenet_class_f16_16384": (16384, 48, 24, 1536, 257, 8),
    "drin_depth_f16_1024": (1024, 24, 16, 1024, 512, 2),
    "sflckr_segmentation_f16_1024": (1024, 24, 16, 1024, 512, 1),
    "faceshq_coordinates_f16_1024": (1024, 24, 16, 1024, 512, 2),
    "coco_objects_f16_8192": (8192, 40, 16, 1408, 348, 6),
    "openimages_objects_f16_8192": (8192, 36, 16, 1536, 348, 6),
}
MAPS = {"drin_depth_f16_1024": ("depth", 1), "sflckr_segmentation_f16_1024": ("segmentation", 182)}


def loaded(name: str) -> ARTrainConfig:
    values = Path(shipped_configs("stage2")[name]).read_text()
    overrides = [] if "kind: scenes" in values else ["data.root=/nowhere"]
    return load_config(ARTrainConfig, name, overrides, group="stage2")


def built(name: str, codes: int, grid: tuple[int, int], factor: int) -> ARModel:
    """The model on the meta device, for a tokenizer of so many codes."""
    config = loaded(name)
    condition: Any = config.condition
    if isinstance(condition, CodesConditionConfig):
        kind, channels = MAPS[name]
        facts = ConditionTokenizerConfig.model_validate(
            {
                "input": kind,
                "channels": channels,
                "codebook_size": codes,
                "downsample_factor": factor,
                "tokenizer_hash": "0",
            }
        )
        condition = condition.model_copy(update={"facts": facts})
    values = ARModelConfig(
        transformer=config.transformer,
        condition=condition,
        vocabulary_size=codes,
        grid=grid,
        order=config.order,
        downsample_factor=factor,
        tokenizer_hash="0",
    )
    with torch.device("meta"):
        return ARModel(values)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_what_it_is(name: str) -> None:
    config = loaded(name)
    assert 20 < len(config.description) < 111
    assert config.training.batch_size % config.training.accumulation == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_published_setting(name: str) -> None:
    codes, layers, heads, width, block, batch = PUBLISHED[name]
    model, config = built(name, codes, (16, 16), 16), loaded(name)
    transformer = config.transformer
    assert isinstance(transformer, GPTConfig)
    assert (transformer.num_layers, transformer.num_heads, transformer.width) == (layers, heads, width)
    assert model.transformer.position_embedding is not None
    assert model.transformer.position_embedding.shape[1] == block
    # Attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D and two norms a layer; table, head, positions and a norm.
    weights = layers * (12 * width**2 + 13 * width) + (2 * codes + block + 2) * width
    assert sum(p.numel() for p in model.parameters()) == weights
    # All tokens are entries of the one table, so that imported weights can be trained further.
    assert not list(model.condition.parameters())
    assert not model.condition.has_null
    assert config.training.batch_size == batch
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch)
    assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.01)
    assert transformer.residual_dropout == (0.1 if "objects" in name else 0.0)


def test_every_published_setting_is_shipped() -> None:
    assert PUBLISHED.keys() <= set(CONFIGS)
