"""Tiny models in other programs' formats, with random weights: what the importers are tried on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.model import VQModel
from stage1_vq.quantizers import GumbelQuantizer
from stage1_vq.quantizers.health import TableQuantizer
from taming.config import build_config

SMALL: dict[str, Any] = {
    "resolution": 16,
    "channels": 32,
    "channel_multipliers": [1, 2, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "z_channels": 8,
    "quantizer": {"kind": "nearest", "codebook_size": 24, "code_dim": 4},
}


def small_model(**changes: Any) -> VQModel:
    """A tokenizer (f4, 32 groups as published) whose codes lie where its latents do."""
    torch.manual_seed(0)
    model = VQModel(build_config(VQModelConfig, SMALL | changes)).eval()
    spread_codes(model)
    return model


@torch.no_grad()
def spread_codes(model: VQModel, inputs: Tensor | None = None) -> None:
    """Give latents mean 0 and deviation 1, and put codes where they lie: encoding then uses many of them.

    `inputs` (B, C, H, W) are what the latents are made of, else noise.
    """
    if inputs is None:
        side = 8 * model.config.downsample_factor
        inputs = torch.rand(8, model.config.in_channels, side, side) * 2 - 1
    latents = model.latents(inputs)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    model.quant_conv.weight.div_(deviation[:, None, None, None])
    model.quant_conv.bias.sub_(mean).div_(deviation)
    rows = model.latents(inputs).permute(0, 2, 3, 1).flatten(0, 2)
    size = model.spec.codebook_size
    codes = rows[torch.randint(len(rows), (size,))] + 0.1 * torch.randn(size, rows.shape[1])
    if isinstance(model.quantize, TableQuantizer):
        model.quantize.place(torch.ones(size, dtype=torch.bool), codes)
    elif isinstance(model.quantize, GumbelQuantizer):
        # Logits that order the codes by their distance.
        model.quantize.proj.weight.copy_(codes[:, :, None, None])
        model.quantize.proj.bias.copy_(-codes.square().sum(1) / 2)


def published_yaml(model: VQModel, target: str = "taming.models.vqgan.VQModel", **params: Any) -> dict:
    """What a model.yaml of the published programs says about such a model."""
    config = model.config
    return {
        "model": {
            "base_learning_rate": 4.5e-6,
            "target": target,
            "params": {
                "embed_dim": config.quantizer.code_dim,
                "n_embed": config.quantizer.codebook_size,
                "ddconfig": {
                    "double_z": False,
                    "z_channels": config.z_channels,
                    "resolution": config.resolution,
                    "in_channels": config.in_channels,
                    "out_ch": config.in_channels,
                    "ch": config.channels,
                    "ch_mult": list(config.channel_multipliers),
                    "num_res_blocks": config.num_res_blocks,
                    "attn_resolutions": list(config.attention_resolutions),
                    "dropout": 0.0,
                },
                "lossconfig": {"target": "taming.modules.losses.vqperceptual.DummyLoss"},
                **params,
            },
        }
    }


def write_published(
    folder: Path, state: dict[str, Any], description: dict[str, Any], **beside: Any
) -> tuple[Path, Path]:
    """(model.ckpt, model.yaml) as Lightning and OmegaConf write them."""
    torch.save({"state_dict": state, "epoch": 3, "global_step": 10, **beside}, folder / "model.ckpt")
    (folder / "model.yaml").write_text(yaml.safe_dump(description), encoding="utf-8")
    return folder / "model.ckpt", folder / "model.yaml"


def llamagen_state(model: VQModel) -> dict[str, Tensor]:
    """The weights of `model` under LlamaGen's names (its tokenizer/tokenizer_image/vq_model.py)."""
    top = len(model.config.channel_multipliers) - 1
    state = {}
    for key, value in model.state_dict().items():
        name = re.sub(r"^encoder\.down\.(\d+)\.", r"encoder.conv_blocks.\1.", key)
        if match := re.match(r"decoder\.up\.(\d+)\.(.+)", key):
            name = f"decoder.conv_blocks.{top - int(match[1])}.{match[2]}"
        name = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", name)
        for index, part in enumerate(("block_1", "attn_1", "block_2")):
            name = name.replace(f".mid.{part}.", f".mid.{index}.")
        state[name] = value
    return state | {"quantize.codebook_used": torch.zeros(65536)}
