"""The shipped configs that are about training: the modern sizes, and few pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.model import ARModel
from taming.config import load_config, shipped_configs

# Millions of weights with 16384 codes on 16x16 cells, as LlamaGen reports them (Sun et al. 2024, table 5).
MODERN = {"modern_small": 111, "modern_base": 343, "modern_large": 775}


def loaded(name: str) -> ARTrainConfig:
    given = Path(shipped_configs("stage2")[name]).read_text()
    overrides = [] if "\n  root:" in given else ["data.root=/nowhere"]
    return load_config(ARTrainConfig, name, overrides, group="stage2")


@pytest.mark.parametrize("name", sorted(shipped_configs("stage2")))
def test_it_loads_and_says_what_it_is(name: str) -> None:
    config = loaded(name)
    assert 20 < len(config.description) < 111
    assert config.training.evaluate_every <= config.training.steps
    # A run that keeps its best must be evaluated on its way.
    if config.keep == "best":
        assert config.training.evaluate_every * 5 <= config.training.steps


@pytest.mark.parametrize("name", MODERN)
def test_the_modern_sizes(name: str) -> None:
    config = loaded(name)
    facts: dict[str, Any] = {"vocabulary_size": 16384, "grid": (16, 16), "downsample_factor": 16}
    with torch.device("meta"):
        model = ARModel(
            ARModelConfig(
                transformer=config.transformer, condition=config.condition, tokenizer_hash="", **facts
            )
        )
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == MODERN[name]
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 0.05)
    assert config.training.batch_size == 256
    assert config.condition.dropout == config.transformer.residual_dropout == 0.1
