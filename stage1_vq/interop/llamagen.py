"""Tokenizers of LlamaGen (Sun et al. 2024, arXiv:2406.06525): the published network under other names.

Their levels stand in running order as encoder.conv_blocks and decoder.conv_blocks, so that the decoder's
first is our highest index; the middle is a list of three; attention is at the lowest level. Codes and latents
are brought to length one where they are compared, which our nearest quantizer does with l2_normalised.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.interop.checkpoint import file_hash, read_checkpoint, tensors_of
from stage1_vq.interop.imported import (
    Imported,
    ImportedDiscriminator,
    build_model,
    discriminator_from,
    grouped,
    net_from_shapes,
)
from taming.config import build_config
from taming.errors import ArtifactError

MIDDLE = ("block_1", "attn_1", "block_2")
USAGE = "quantize.codebook_used"


def import_llamagen(checkpoint: Path, *, ema: bool = False) -> Imported:
    """The tokenizer in a LlamaGen checkpoint (vq_ds16_c2i.pt, say); everything follows from its shapes.

    Takes the weights under `model`, or with `ema` those under `ema`; a file of bare weights is taken as it
    is. Raises ArtifactError.
    """
    content = read_checkpoint(checkpoint)
    section = "ema" if ema else "model"
    if ema and "ema" not in content:
        raise ArtifactError(f"checkpoint {checkpoint} has no moving averages (ema); leave --ema out")
    theirs = tensors_of(content, checkpoint, section)
    num_levels = len({m[1] for key in theirs if (m := re.match(r"decoder\.conv_blocks\.(\d+)\.", key))})
    if not num_levels:
        raise ArtifactError(
            f"checkpoint {checkpoint} is not a LlamaGen tokenizer: it has no decoder.conv_blocks; "
            "taming-transformers and diffusers are the other formats"
        )
    state = {our_name(key, num_levels): value for key, value in theirs.items() if key != USAGE}
    left_out = [("a record of which codes were used in training", USAGE)] if USAGE in theirs else []
    discriminator, reason = _discriminator(content, checkpoint)
    left_out += [(reason, f"discriminator.{key}") for key in content.get("discriminator", {}) if reason]
    model = build_model(_config(state, checkpoint), state, source=checkpoint)
    return Imported(
        model,
        num_used=len(state) + (len(discriminator.network.state_dict()) if discriminator else 0),
        discriminator=discriminator,
        left_out=grouped(left_out),
        notes=("LlamaGen trains at 256; pictures of any other size pass as well",),
        origin={
            "program": "LlamaGen",
            "checkpoint": checkpoint.name,
            "sha256": file_hash(checkpoint),
            "section": section if section in content else None,
        },
    )


def our_name(key: str, num_levels: int) -> str:
    """Our name of one of their tensors; names that are the same in both stay."""
    side, _, rest = key.partition(".")
    if match := re.match(r"conv_blocks\.(\d+)\.(res|attn|downsample|upsample)\.(.+)", rest):
        index, part, name = int(match[1]), match[2], match[3]
        level = f"down.{index}" if side == "encoder" else f"up.{num_levels - 1 - index}"
        return f"{side}.{level}.{'block' if part == 'res' else part}.{name}"
    if (match := re.match(r"mid\.(\d)\.(.+)", rest)) and int(match[1]) < len(MIDDLE):
        return f"{side}.mid.{MIDDLE[int(match[1])]}.{match[2]}"
    return key


def _config(state: dict[str, Tensor], path: Path) -> VQModelConfig:
    try:
        values = net_from_shapes(state)
        size, width = state["quantize.embedding.weight"].shape
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"checkpoint {path} is not a whole LlamaGen tokenizer: missing {error}") from None
    values["quantizer"] = {
        "kind": "nearest",
        "codebook_size": int(size),
        "code_dim": int(width),
        "l2_normalised": True,
        "beta": 0.25,
        "beta_on": "commitment",
    }
    return build_config(VQModelConfig, values, source=str(path))


def _discriminator(content: dict, path: Path) -> tuple[ImportedDiscriminator | None, str]:
    """Its PatchGAN where it has one, and else why another one is left out."""
    if "discriminator" not in content:
        return None, ""
    state = tensors_of(content, path, "discriminator")
    if "main.0.weight" not in state:
        return None, "a discriminator other than a PatchGAN"
    return discriminator_from(state, source=path), ""
