"""How diffusers.VQModel names and shapes what our network has: the one map for both directions.

Levels of the decoder count from the lowest resolution there and from the highest here; attention weights are
(C, C) there and 1x1 convolutions (C, C, 1, 1) here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from einops import rearrange
from torch import Tensor

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in files that diffusers wrote before version 0.18."""
MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def to_diffusers(key: str, num_levels: int) -> str:
    """Their name of one of our tensors; names that are the same in both stay."""
    side, _, rest = key.partition(".")
    if match := re.match(r"(down|up)\.(\d+)\.(?:(block|attn)\.(\d+)|downsample|upsample)\.(.+)", rest):
        index = int(match[2]) if match[1] == "down" else num_levels - 1 - int(match[2])
        level = f"{side}.{match[1]}_blocks.{index}"
        match match[3]:
            case "block":
                return f"{level}.resnets.{match[4]}.{_block(match[5])}"
            case "attn":
                return f"{level}.attentions.{match[4]}.{_attention(match[5])}"
            case _:
                return f"{level}.{match[1]}samplers.0.{match[5]}"
    if match := re.match(r"mid\.(block_1|attn_1|block_2)\.(.+)", rest):
        inner = _attention(match[2]) if match[1] == "attn_1" else _block(match[2])
        return f"{side}.mid_block.{MIDDLE[match[1]]}.{inner}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", key)


def state_to_diffusers(state: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Our state dict (without the quantizer's) under their names and shapes."""
    result = {}
    for key, value in state.items():
        name = to_diffusers(key, num_levels)
        linear = ".attentions." in name and value.ndim == 4
        result[name] = rearrange(value, "o i 1 1 -> o i") if linear else value
    return result


def state_from_diffusers(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict under the names of `ours`, whose values are not looked at but for their shape.

    What has no name here keeps its own, so that loading tells it.
    """
    levels = {m[1] for key in ours if (m := re.match(r"decoder\.up\.(\d+)\.", key))}
    names = {to_diffusers(key, len(levels)): key for key in ours}
    result = {}
    for key, value in state.items():
        name = names.get(modern(key), key)
        if name in ours and value.ndim == 2 and ours[name].ndim == 4:
            value = rearrange(value, "o i -> o i 1 1")
        result[name] = value
    return result


def modern(key: str) -> str:
    """A name of theirs as today's version writes it."""
    if ".attentions." not in key:
        return key
    *front, last, kind = key.split(".")
    return ".".join((*front, OLD_ATTENTION.get(last, last), kind))


def _block(name: str) -> str:
    return name.replace("nin_shortcut", "conv_shortcut")


def _attention(name: str) -> str:
    part, _, kind = name.partition(".")
    return f"{ATTENTION[part]}.{kind}"
