"""Folders that diffusers.VQModel reads and writes: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.interop.checkpoint import file_hash, read_checkpoint, tensors_of
from stage1_vq.interop.diffusers_layout import state_from_diffusers, state_to_diffusers
from stage1_vq.interop.exported import ExportReport, check, compare, new_folder, optional, write_description
from stage1_vq.interop.imported import Imported, build_model
from stage1_vq.interop.nearest_form import NearestForm, nearest_form
from stage1_vq.model import VQModel
from taming.config import build_config, read_small_text
from taming.errors import ArtifactError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
DESCRIPTION = "tokenizer.json"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
"""Kinds of levels, and whether they have attention."""
FIXED = {"act_fn": "silu", "norm_type": "group"}
IGNORED = {"sample_size", "scaling_factor", "lookup_from_codebook", "force_upcast"}
"""They do not change codes or pictures here: `scaling_factor` is for a diffusion model on the latents."""
TABLE_SCALE = 2.0**-12
"""Where searching and decoding need two tables, the second lies beside the first so small that it does not
move the nearest row; a power of two, which changes no bit of the codes."""
EXPRESSED = {
    *("input", "in_channels", "resolution", "channels", "channel_multipliers", "num_res_blocks"),
    *("attention_resolutions", "mid_attention", "z_channels", "norm_num_groups", "quantizer"),
    *("dropout", "recompute"),
}
"""Config keys that the export says in other words, or that only concern training."""


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
        values = json.loads(read_small_text(path))
    except (OSError, ValueError, RecursionError) as error:
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


def export_diffusers(model: VQModel, out: Path, inputs: Sequence[Tensor]) -> ExportReport:
    """Write a folder that diffusers.VQModel.from_pretrained loads, with the same codes and pictures.

    Loads it again and compares on `inputs`, (1, C, H, W) each. Raises ArtifactError where diffusers has no
    such network or quantizer, or computes something else; UserError where it is not installed.
    """
    refuse_inexpressible(model.config)
    form = nearest_form(model.quantize)
    library = optional("diffusers")
    notes: tuple[str, ...] = ()
    if not form.one_table:
        notes = (
            f"the codebook there has width {form.searched.shape[1] + form.codes.shape[1]}: rows to search, "
            "then rows to decode",
        )
    with new_folder(out):
        theirs = library.VQModel(**_their_config(model.config, form))
        theirs.load_state_dict(_their_state(model, form, inputs))
        theirs.save_pretrained(out)
        loaded = library.VQModel.from_pretrained(out).eval()

        def encode(values: Tensor) -> Tensor:
            latents = loaded.encode(values).latents
            batch, _, height, width = latents.shape
            indices: Tensor = loaded.quantize(latents)[2][2]
            return rearrange(indices, "(b h w) -> b h w", b=batch, h=height, w=width)

        def decode(codes: Tensor) -> Tensor:
            shape = (*codes.shape, loaded.config.vq_embed_dim)
            sample: Tensor = loaded.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
            return sample

        report = compare("diffusers", model, inputs, encode, decode, notes)
        check(report)
        write_description(out / DESCRIPTION, model, report)
    return report


def refuse_inexpressible(config: VQModelConfig) -> None:
    """Raises ArtifactError for what diffusers.VQModel has no option for, by name."""
    problem = None
    if config.decoder.kind != "cnn":
        problem = f"decoder.kind is {config.decoder.kind}; it has the published one, cnn"
    elif config.input != "image":
        problem = f"input is {config.input}; it takes pictures"
    elif config.channel_multipliers[0] != 1:
        problem = (
            f"channel_multipliers begin with {config.channel_multipliers[0]}; its first level is as wide as "
            "its first convolution (1)"
        )
    for name, option in VQModelConfig.model_fields.items():
        if problem is None and name not in EXPRESSED and getattr(config, name) != option.get_default():
            problem = f"{name} is {getattr(config, name)!r}; it only has {option.get_default()!r}"
    if problem is not None:
        way = "export to onnx" if config.decoder.kind in ("cnn", "sagan") else "export the codebook"
        raise ArtifactError(f"diffusers.VQModel cannot express this model: {problem}; {way} instead")


def _their_config(config: VQModelConfig, form: NearestForm) -> dict[str, Any]:
    levels = [config.resolution // 2**i for i in range(len(config.channel_multipliers))]
    attention = [size in config.attention_resolutions for size in levels]
    down, up = ({has: name for name, has in kinds.items()} for kinds in (DOWN, UP))
    return {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [down[has] for has in attention],
        "up_block_types": [up[has] for has in reversed(attention)],
        "block_out_channels": [config.channels * m for m in config.channel_multipliers],
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.z_channels,
        "sample_size": config.resolution,
        "num_vq_embeddings": len(form.codes),
        "norm_num_groups": config.norm_num_groups,
        "vq_embed_dim": form.searched.shape[1] + (0 if form.one_table else form.codes.shape[1]),
        "scaling_factor": 1.0,
        "mid_block_add_attention": config.mid_attention,
        "lookup_from_codebook": True,
    }


@torch.no_grad()
def _their_state(model: VQModel, form: NearestForm, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Our weights under their names, the quantizer as a table, and the 1x1 layers about it made to suit.

    Where only directions count, the latents are brought near the rows' length by a power of two: at that
    length the distances round least.
    """
    ours = {
        key: value.float() for key, value in model.state_dict().items() if not key.startswith("quantize.")
    }
    state = state_to_diffusers(ours, len(model.config.channel_multipliers))
    searched, codes = form.searched, form.codes
    if form.directions_only:
        length = torch.cat([model.latents(values).norm(dim=1).flatten() for values in inputs]).mean()
        scale = 2.0 ** torch.log2(codes.norm(dim=1).mean() / length).round()
        for name in ("quant_conv.weight", "quant_conv.bias"):
            state[name] = state[name] * scale
    table = searched
    if not form.one_table:
        table = torch.cat((searched, codes * TABLE_SCALE), dim=1)
        width = table.shape[1]
        # Latents: the model's, then zeros. Codes: only the second part is read, and made large again.
        before = state["quant_conv.weight"].new_zeros(width, model.config.z_channels, 1, 1)
        bias = before.new_zeros(width)
        before[: len(state["quant_conv.weight"])] = state["quant_conv.weight"]
        bias[: len(state["quant_conv.bias"])] = state["quant_conv.bias"]
        after = before.new_zeros(model.config.z_channels, width, 1, 1)
        after[:, searched.shape[1] :] = state["post_quant_conv.weight"] / TABLE_SCALE
        state |= {"quant_conv.weight": before, "quant_conv.bias": bias, "post_quant_conv.weight": after}
    return state | {"quantize.embedding.weight": table}
