"""The published model descriptions (YAML) as our configs.

Such a file names Python classes under `target`, and the published programs import and run whatever stands
there. Here the names are only compared with a fixed table. Keys that might change what is computed and are
not known are refused, never skipped. Facts: CompVis/taming-transformers and CompVis/latent-diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stage1_vq.config import VQModelConfig
from taming.config import build_config, read_yaml
from taming.errors import ConfigError

Family = Literal["nearest", "gumbel", "ema"]
FAMILIES: dict[str, Family] = {
    "taming.models.vqgan.VQModel": "nearest",
    "taming.models.vqgan.VQSegmentationModel": "nearest",
    "taming.models.vqgan.VQNoDiscModel": "nearest",
    "taming.models.vqgan.GumbelVQ": "gumbel",
    "taming.models.vqgan.EMAVQ": "ema",
    "ldm.models.autoencoder.VQModel": "nearest",
    "ldm.models.autoencoder.VQModelInterface": "nearest",
}
CONTAINERS = (
    "taming.models.cond_transformer.Net2NetTransformer",
    "ldm.models.diffusion.ddpm.LatentDiffusion",
)
"""Models that hold autoencoders as first_stage_model and cond_stage_model."""
Part = Literal["first_stage_model", "cond_stage_model"]

COSINE = "taming.lr_scheduler.LambdaWarmUpCosineScheduler"

MODEL_KEYS = {"ddconfig", "lossconfig", "n_embed", "embed_dim", "image_key", "n_labels", "kl_weight"}
IDLE_MODEL_KEYS = {
    *("monitor", "ckpt_path", "ignore_keys", "colorize_nlabels", "remap", "sane_index_shape", "use_ema"),
    *("batch_resize_range", "scheduler_config", "lr_g_factor", "temperature_scheduler_config"),
    *("learning_rate", "base_learning_rate"),
}
"""They steer training, display or the shape of results, not what a model computes; a remap travels in the
checkpoint as quantize.used, a Gumbel temperature is taken where it is the published schedule."""
NET_KEYS = {"z_channels", "resolution", "in_channels", "ch", "ch_mult", "num_res_blocks", "attn_resolutions"}
IDLE_NET_VALUES: dict[str, Any] = {
    "double_z": False,
    "resamp_with_conv": True,
    "tanh_out": False,
    "give_pre_end": False,
    "use_linear_attn": False,
}
"""Options with the one value that our network has; any other is refused."""


@dataclass(frozen=True)
class Published:
    """What a YAML file says about one autoencoder."""

    model: VQModelConfig
    loss: dict[str, Any]
    """`lossconfig` as it stands, for the record."""
    notes: tuple[str, ...]


def read_published(path: Path, part: Part | None) -> Published:
    """The autoencoder that `path` describes, or its `part` where it describes a larger model.

    Raises ConfigError naming the key at fault.
    """
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist; give the YAML file that came with the checkpoint")
    section = section_of(read_yaml(path), "model", path)
    target = section.get("target")
    if target in CONTAINERS:
        section = _part_of(section_of(section, "params", path), part, path)
        target = section.get("target")
    if target not in FAMILIES:
        raise ConfigError(
            f"{path}: target {target!r} is not an autoencoder that can be imported; known are "
            f"{', '.join(FAMILIES)}, and these inside {' and '.join(CONTAINERS)}"
        )
    return _translate(FAMILIES[target], str(target), section_of(section, "params", path), path)


def _part_of(params: dict[str, Any], part: Part | None, path: Path) -> dict[str, Any]:
    if part is None:
        raise ConfigError(
            f"{path} describes a model with several parts; say which one with --part first_stage_model or "
            "--part cond_stage_model"
        )
    name = part.replace("_model", "_config")
    value = params.get(name)
    if value == "__is_first_stage__":
        value = params.get("first_stage_config")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} is {value!r}, so there is no {part} to import")
    return value


def _translate(family: Family, target: str, params: dict[str, Any], path: Path) -> Published:
    net = section_of(params, "ddconfig", path)
    only_known(params, MODEL_KEYS | IDLE_MODEL_KEYS, {"ddconfig", "n_embed", "embed_dim"}, path)
    idle = IDLE_NET_VALUES.keys() | {"dropout", "attn_type", "out_ch"}
    only_known(net, NET_KEYS | idle, NET_KEYS, path)
    for key, only in IDLE_NET_VALUES.items():
        if net.get(key, only) != only:
            raise ConfigError(f"{path}: ddconfig.{key} is {net[key]!r}; only {only!r} can be imported")
    if net.get("out_ch", net["in_channels"]) != net["in_channels"]:
        raise ConfigError(
            f"{path}: ddconfig.out_ch is {net['out_ch']!r} and in_channels {net['in_channels']!r}; "
            "a tokenizer paints what it sees, they must be equal"
        )
    attention = net.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise ConfigError(f"{path}: ddconfig.attn_type is {attention!r}; vanilla and none can be imported")
    loss = params.get("lossconfig") or {}
    loss_params = (loss.get("params") if isinstance(loss, dict) else None) or {}
    try:
        levels = [net["resolution"] // 2**level for level in range(len(net["ch_mult"]))]
        wanted = list(net["attn_resolutions"])
        multipliers = list(net["ch_mult"])
        loss_weight = float(loss_params.get("codebook_weight", 1.0))
        kl_weight = float(params.get("kl_weight", 1e-8))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is not of the published form ({error})") from None
    sizes = [] if attention == "none" else [size for size in wanted if size in levels]
    notes = []
    if family == "nearest" or family == "ema":
        notes.append("quantizer trained with beta 0.25 (the published training code has no other)")
    if wanted != sizes:
        notes.append(f"attention_resolutions is {sizes}: no level has another size, or attn_type is none")
    kind = params.get("image_key", "image")
    segmentation = target.endswith("VQSegmentationModel") or kind == "segmentation"
    if segmentation and params.get("n_labels", net["in_channels"]) != net["in_channels"]:
        raise ConfigError(
            f"{path}: n_labels is {params['n_labels']!r} and ddconfig.in_channels {net['in_channels']!r}; "
            "label maps are given one-hot, they must be equal"
        )
    values = {
        "input": "segmentation" if segmentation else "depth" if kind == "depth" else "image",
        "in_channels": net["in_channels"],
        "resolution": net["resolution"],
        "channels": net["ch"],
        "channel_multipliers": multipliers,
        "num_res_blocks": net["num_res_blocks"],
        "attention_resolutions": sizes,
        "mid_attention": attention != "none",
        "z_channels": net["z_channels"],
        "dropout": net.get("dropout", 0.0),
        "quantizer": quantizer_values(
            family,
            params["n_embed"],
            params["embed_dim"],
            loss_weight=loss_weight,
            kl_weight=kl_weight,
        )
        | (_temperature(params.get("temperature_scheduler_config")) if family == "gumbel" else {}),
    }
    return Published(build_config(VQModelConfig, values, source=str(path)), loss, tuple(notes))


def quantizer_values(
    family: Family, codebook_size: int, code_dim: int, *, loss_weight: float = 1.0, kl_weight: float = 1e-8
) -> dict[str, Any]:
    """Values of the quantizer's config, with the losses that the published weights were trained with."""
    values: dict[str, Any] = {"kind": family, "codebook_size": codebook_size, "code_dim": code_dim}
    match family:
        case "nearest":
            return values | {"beta": 0.25, "beta_on": "codebook", "loss_weight": loss_weight}
        case "gumbel":
            return values | {"kl_weight": kl_weight * loss_weight}
        case "ema":
            return values | {"beta": 0.25 * loss_weight}


def _temperature(schedule: Any) -> dict[str, Any]:
    """The published cosine schedule as the Gumbel quantizer's config; nothing where it is another one."""
    if not isinstance(schedule, dict) or schedule.get("target") != COSINE:
        return {}
    params = schedule.get("params") or {}
    wanted = ("lr_max", "lr_min", "warm_up_steps", "max_decay_steps")
    if any(name not in params for name in wanted) or params.get("lr_start") != params["lr_max"]:
        return {}
    names = ("temperature_start", "temperature_end", "temperature_hold_steps", "temperature_steps")
    return {name: params[key] for name, key in zip(names, wanted, strict=True)}


def section_of(values: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The mapping under `key` of a YAML file. Raises ConfigError where there is none."""
    value = values.get(key)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} has no section {key!r} where the published files have one; it holds: "
            f"{', '.join(map(str, list(values)[:8]))}"
        )
    return value


def only_known(values: Mapping[str, Any], known: set[str], needed: set[str], path: Path) -> None:
    """Raises ConfigError for a key that is not `known`, or one that is `needed` and missing."""
    unknown, missing = sorted(map(str, values.keys() - known)), sorted(needed - values.keys())
    if unknown:
        raise ConfigError(
            f"{path}: key {unknown[0]!r} is not one that can be imported; known: {sorted(known)}"
        )
    if missing:
        raise ConfigError(f"{path}: key {missing[0]!r} is missing")
