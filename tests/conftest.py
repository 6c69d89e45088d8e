"""What several tests stand on: tiny models, data and configs that train in a second."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig, VQTrainConfig
from stage2_ar import ARPipeline
from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.model import ARModel
from taming.config import build_config

# Models as small as these compute faster on one thread, and other work on the machine disturbs it less.
torch.set_num_threads(1)

TINY_MODEL: dict[str, Any] = {
    "resolution": 16,
    "channels": 8,
    "channel_multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "mid_attention": False,
    "z_channels": 8,
    "norm_num_groups": 4,
    "quantizer": {"kind": "nearest", "codebook_size": 16, "code_dim": 4},
}
TINY_TRAINING: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "precision": "fp32",
    "log_every": 1,
    "evaluate_every": 2,
    "preview_every": 4,
    "checkpoint_every": 2,
}


def vq_values(**changes: Any) -> dict[str, Any]:
    """Values of a tiny VQTrainConfig on the scenes."""
    return {
        "data": {"kind": "scenes", "size": 16, "num_train": 12, "num_validation": 6},
        "model": TINY_MODEL,
        "loss": {"perceptual_weight": 0},
        "discriminator": {"network": {"kind": "patchgan", "channels": 4, "num_layers": 1}, "start_step": 1},
        "optimizer": {"learning_rate": 1e-3},
        "training": TINY_TRAINING,
        **changes,
    }


def ar_values(**changes: Any) -> dict[str, Any]:
    """Values of a tiny ARTrainConfig on the scenes; `tokenizer` or `data` are the caller's."""
    return {
        "data": {"kind": "scenes", "size": 16, "num_train": 12, "num_validation": 6},
        "transformer": {"kind": "llama", "num_layers": 1, "num_heads": 2, "width": 16},
        "condition": {"kind": "segmentation", "num_labels": 7, "hidden_width": 8, "label_dim": 4},
        "optimizer": {"learning_rate": 1e-3},
        "training": TINY_TRAINING,
        **changes,
    }


def vq_config(**changes: Any) -> VQTrainConfig:
    return build_config(VQTrainConfig, vq_values(**changes))


def ar_config(**changes: Any) -> ARTrainConfig:
    return build_config(ARTrainConfig, ar_values(**changes))


@pytest.fixture
def tokenizer() -> VQModel:
    """A tiny tokenizer, f2, 16 codes, untrained."""
    torch.manual_seed(0)
    return VQModel(build_config(VQModelConfig, TINY_MODEL)).eval()


def make_pipeline(tokenizer: VQModel, condition: dict[str, Any], **transformer: Any) -> ARPipeline:
    """A tiny untrained pipeline on 4x4 cells (8x8 pixels)."""
    torch.manual_seed(1)
    config = build_config(
        ARModelConfig,
        {
            "transformer": {"kind": "llama", "num_layers": 2, "num_heads": 2, "width": 16, **transformer},
            "condition": condition,
            "vocabulary_size": tokenizer.spec.codebook_size,
            "grid": [4, 4],
            "downsample_factor": tokenizer.spec.downsample_factor,
            "tokenizer_hash": tokenizer.codes_hash(),
        },
    )
    model = ARModel(config)
    with torch.no_grad():  # far from uniform, so that a wrong logit changes a code
        model.transformer.head.weight.mul_(100)
    return ARPipeline(model, tokenizer)
