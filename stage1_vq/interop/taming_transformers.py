"""Models of taming-transformers and of latent diffusion's first stages (Lightning checkpoint and YAML).

Our modules carry the published names, so that a checkpoint loads as it is; what has to be decided is which of
its tensors are the model, and what the YAML beside it means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.interop.checkpoint import file_hash, read_checkpoint, tensors_of
from stage1_vq.interop.imported import (
    Imported,
    build_model,
    discriminator_from,
    grouped,
    net_from_shapes,
)
from stage1_vq.interop.published_config import Family, Part, Published, quantizer_values, read_published
from stage1_vq.model import VQModel
from taming.config import build_config
from taming.errors import ArtifactError

DISCRIMINATOR = "loss.discriminator."
MOVING_AVERAGE = "model_ema."
LEFT_OUT = {
    "loss.perceptual_loss.": "weights of the perceptual loss, which this toolkit has itself",
    MOVING_AVERAGE: "moving averages of the weights; --ema imports them instead",
    "colorize": "random colours for showing label maps",
}
TABLES: dict[Family, tuple[str, ...]] = {
    "nearest": ("quantize.embedding.weight",),
    "ema": ("quantize.embedding.weight", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg"),
    "gumbel": ("quantize.proj.weight", "quantize.proj.bias", "quantize.embed.weight"),
}
"""Tensors with one row a code."""


def import_taming_transformers(
    checkpoint: Path, *, config: Path | None = None, part: Part | None = None, ema: bool = False
) -> Imported:
    """The tokenizer in `checkpoint` (.ckpt, or its weights as .safetensors), read without running its code.

    `config` is the YAML beside it; without one the model follows from the shapes where they leave no doubt.
    `part` takes the first or condition stage out of a transformer's (or latent diffusion's) checkpoint;
    `ema` takes the moving averages of the weights. Raises ArtifactError or ConfigError.
    """
    published = read_published(config, part) if config is not None else None
    state = tensors_of(read_checkpoint(checkpoint), checkpoint, "state_dict")
    return tokenizer_from(state, checkpoint, published=published, part=part, ema=ema)


def tokenizer_from(
    tensors: dict[str, Tensor],
    checkpoint: Path,
    *,
    published: Published | None = None,
    part: Part | None = None,
    ema: bool = False,
    sha256: str | None = None,
) -> Imported:
    """As `import_taming_transformers`, of a checkpoint and a YAML that were read before.

    `sha256` is that of the checkpoint's bytes, where the caller has it.
    """
    found = _sort(tensors, part, checkpoint)
    if published is None:
        published = _from_shapes(found.weights, checkpoint, found.num_labels)
    notes = list(published.notes)
    state = dict(found.weights)
    if ema:
        state |= _averages(found.averages, published.model, checkpoint)
        notes.append("the weights are the checkpoint's moving averages")
    model_config = published.model
    if found.kept_codes is not None:
        model_config, state = _compact(model_config, state, found.kept_codes, checkpoint)
        notes.append(
            f"the checkpoint keeps {model_config.quantizer.codebook_size} of "
            f"{published.model.quantizer.codebook_size} codes (quantize.used): the codebook holds these "
            "alone, numbered as its transformers number them; cells that chose another code take the nearest "
            "of them"
        )
    model = build_model(model_config, state, source=checkpoint)
    second = found.discriminator
    return Imported(
        model,
        num_used=len(state) + len(second) + (found.kept_codes is not None),
        discriminator=discriminator_from(second, source=checkpoint) if second else None,
        left_out=grouped(found.left_out),
        notes=tuple(notes),
        origin={
            "program": "taming-transformers",
            "checkpoint": checkpoint.name,
            "sha256": sha256 or file_hash(checkpoint),
            "part": part,
            "lossconfig": published.loss,
        },
    )


@dataclass
class _Sorted:
    """The tensors of a checkpoint by what they are for."""

    weights: dict[str, Tensor] = field(default_factory=dict)
    discriminator: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(reason, name)."""
    kept_codes: Tensor | None = None
    num_labels: int | None = None


def _sort(state: dict[str, Tensor], part: Part | None, path: Path) -> _Sorted:
    found = _Sorted()
    prefix = f"{part}." if part else ""
    if part and not any(key.startswith(prefix) for key in state):
        parts = sorted({key.partition(".")[0] for key in state})
        raise ArtifactError(f"checkpoint {path} has no {part}; its parts are {', '.join(parts)}")
    if not part and any(key.startswith("first_stage_model.") for key in state):
        raise ArtifactError(
            f"checkpoint {path} holds a model with several parts; say which one with "
            "--part first_stage_model or --part cond_stage_model"
        )
    for full, value in state.items():
        if not full.startswith(prefix):
            found.left_out.append((f"not part of {part}", full))
            continue
        key = full.removeprefix(prefix)
        if key == "colorize":
            found.num_labels = value.shape[1]
        if key.startswith(MOVING_AVERAGE):
            found.averages[key.removeprefix(MOVING_AVERAGE)] = value
        reason = next((why for start, why in LEFT_OUT.items() if key.startswith(start)), None)
        if reason is not None:
            found.left_out.append((reason, full))
        elif key.startswith(DISCRIMINATOR):
            found.discriminator[key.removeprefix(DISCRIMINATOR)] = value
        elif key == "quantize.used":
            found.kept_codes = value.long()
        else:
            found.weights[key] = value
    return found


def _averages(averages: dict[str, Tensor], config: VQModelConfig, path: Path) -> dict[str, Tensor]:
    """Moving averages under the names of the parameters: they are stored without the dots."""
    if not averages:
        raise ArtifactError(f"checkpoint {path} has no moving averages ({MOVING_AVERAGE}*); leave --ema out")
    with torch.device("meta"):
        names = [name for name, _ in VQModel(config).named_parameters()]
    missing = [name for name in names if name.replace(".", "") not in averages]
    if missing:
        raise ArtifactError(
            f"checkpoint {path} has moving averages, but {len(missing)} parameters are not among them "
            f"({', '.join(missing[:3])}); import without --ema"
        )
    return {name: averages[name.replace(".", "")] for name in names}


def _compact(
    config: VQModelConfig, state: dict[str, Tensor], kept: Tensor, path: Path
) -> tuple[VQModelConfig, dict[str, Tensor]]:
    quantizer = config.quantizer
    if kept.ndim != 1 or len(kept) < 2 or int(kept.min()) < 0 or int(kept.max()) >= quantizer.codebook_size:
        raise ArtifactError(
            f"checkpoint {path}: quantize.used does not list codes of 0 to {quantizer.codebook_size - 1}"
        )
    tables = [name for name in state if any(name in names for names in TABLES.values())]
    for name in tables:
        if len(state[name]) != quantizer.codebook_size:
            raise ArtifactError(
                f"{path} does not fit its config: {name} has {len(state[name])} rows there and "
                f"{quantizer.codebook_size} by the config"
            )
    values: dict[str, Any] = config.model_dump()
    values["quantizer"]["codebook_size"] = len(kept)
    return build_config(VQModelConfig, values), state | {name: state[name][kept] for name in tables}


def _from_shapes(state: dict[str, Tensor], path: Path, num_labels: int | None) -> Published:
    """The model that these weights belong to, where no YAML says it."""
    families: tuple[Family, ...] = ("gumbel", "ema", "nearest")
    family = next((f for f in families if TABLES[f][-1] in state), None)
    try:
        if family is None:
            raise ValueError("no codebook under a known name")
        values = net_from_shapes(state)
        size, width = state["quantize.embed.weight" if family == "gumbel" else TABLES[family][0]].shape
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"checkpoint {path}: the model does not follow from its weights ({error}); give the YAML file "
            "that came with it as --config"
        ) from None
    if num_labels == values["in_channels"]:
        values["input"] = "segmentation"
    elif values["in_channels"] != 3:
        raise ArtifactError(
            f"checkpoint {path} takes {values['in_channels']} channel(s), and its weights do not say whether "
            "they are grey pictures, depth or labels; give the YAML file that came with it as --config"
        )
    values["quantizer"] = quantizer_values(family, int(size), int(width))
    notes = (
        "no --config: the model follows from the shapes; its training resolution is taken as 256",
        "the quantizer's loss is taken to be the published one",
    )
    return Published(build_config(VQModelConfig, values, source=str(path)), {}, notes)
