"""Folders that diffusers.VQModel reads and writes: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.interop.checkpoint import file_hash, read_checkpoint, tensors_of
from stage1_vq.interop.diffusers_layout import state_from_diffusers
from stage1_vq.interop.imported import Imported, build_model
from stage1_vq.model import VQModel
from taming.config import build_config
from taming.errors import ArtifactError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
"""Kinds of levels, and whether they have attention."""
FIXED = {"act_fn": "silu", "norm_type": "group"}
IGNORED = {"sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast"}
"""They do not change codes or pictures here: `scaling_factor` is for a diffusion model on the latents."""


def import_diffusers(folder: Path) -> Imported:
    """The tokenizer in a folder that diffusers.VQModel.save_pretrained wrote; diffusers is not needed.

    Raises ArtifactError naming what is missing, or what our network does not have.
    """
    theirs = _read_config(folder)
    config = _translate(theirs, folder / CONFIG)
    weights = next((folder / name for name in (WEIGHTS, PICKLED_WEIGHTS) if (folder / name).is_file()), None)
    if weights is None:
        raise ArtifactError(f"{folder} holds neither {WEIGHTS} nor {PICKLED_WEIGHTS}")
    state = tensors_of(read_checkpoint(weights), weights, "state_dict")
    with torch.device("meta"):
        ours: dict[str, Tensor] = VQModel(config).state_dict()
    model = build_model(config, state_from_diffusers(state, ours), source=weights)
    return Imported(
        model,
        num_used=len(state),
        notes=("the quantizer's loss is that of diffusers: beta 0.25 on the codebook term",),
        origin={
            "program": "diffusers",
            "version": theirs.get("_diffusers_version"),
            "checkpoint": weights.name,
            "sha256": file_hash(weights),
        },
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is not a folder with a {CONFIG}; give the folder that diffusers.VQModel saved "
            "(of a pipeline, the folder of its vqvae or movq)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name != "VQModel":
        raise ArtifactError(f"{path} describes {name!r}, not a diffusers VQModel")
    return dict(values)


def _translate(theirs: dict[str, Any], path: Path) -> VQModelConfig:
    """Our config of their network. Defaults are those of diffusers' own constructor."""

    def refuse(what: str) -> ArtifactError:
        return ArtifactError(f"{path}: {what}")

    values = {key: value for key, value in theirs.items() if not key.startswith("_")}
    widths = list(values.pop("block_out_channels", (64,)))
    down = list(values.pop("down_block_types", ("DownEncoderBlock2D",)))
    up = list(values.pop("up_block_types", ("UpDecoderBlock2D",)))
    in_channels, out_channels = values.pop("in_channels", 3), values.pop("out_channels", 3)
    latent = values.pop("latent_channels", 3)
    code_dim = values.pop("vq_embed_dim", None) or latent
    mid = values.pop("mid_block_add_attention", True)
    blocks, groups = values.pop("layers_per_block", 1), values.pop("norm_num_groups", 32)
    size = values.pop("num_vq_embeddings", 256)
    for key, only in FIXED.items():
        if values.pop(key, only) != only:
            raise refuse(f"{key} is {theirs[key]!r}; only {only!r} can be imported")
    unknown = sorted(values.keys() - IGNORED)
    if unknown:
        raise refuse(f"key {unknown[0]!r} is not one that can be imported")
    for kinds, known in ((down, DOWN), (up, UP)):
        odd = [kind for kind in kinds if kind not in known]
        if odd or len(kinds) != len(widths):
            raise refuse(f"blocks {kinds} cannot be imported; give one of {', '.join(known)} for each width")
    attention = [DOWN[kind] for kind in down]
    if attention != [UP[kind] for kind in reversed(up)]:
        raise refuse("encoder and decoder have attention at different levels, which our network has not")
    if in_channels != out_channels:
        raise refuse(f"in_channels is {in_channels} and out_channels {out_channels}; they must be equal")
    if any(width % widths[0] for width in widths):
        raise refuse(f"block_out_channels {widths} are not multiples of the first")
    resolution = 256
    return build_config(
        VQModelConfig,
        {
            "in_channels": in_channels,
            "resolution": resolution,
            "channels": widths[0],
            "channel_multipliers": [width // widths[0] for width in widths],
            "num_res_blocks": blocks,
            "attention_resolutions": [resolution // 2**i for i, has in enumerate(attention) if has],
            "mid_attention": mid,
            "z_channels": latent,
            "norm_num_groups": groups,
            "quantizer": {
                "kind": "nearest",
                "codebook_size": size,
                "code_dim": code_dim,
                "beta": 0.25,
                "beta_on": "codebook",
            },
        },
        source=str(path),
    )
