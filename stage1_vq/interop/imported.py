"""What every import gives: a model, its discriminator where there was one, and an account of every tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.model import VQModel
from taming.artifact import load_state
from taming.building import build_with
from taming.errors import ArtifactError
from taming.gan.discriminators.patchgan import Norm, PatchGAN, PatchGANConfig
from taming.gan.discriminators.saved import save_discriminator


@dataclass(frozen=True)
class ImportedDiscriminator:
    """The second player, with which fine-tuning can go on."""

    network: PatchGAN
    config: PatchGANConfig


@dataclass(frozen=True)
class Imported:
    """A model of another program in ours."""

    model: VQModel
    """In eval mode."""
    num_used: int
    """Tensors of the source that the model is made of."""
    discriminator: ImportedDiscriminator | None = None
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> names of the tensors that were not taken."""
    notes: tuple[str, ...] = ()
    """What a user should know of the translation."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Plain facts about the source, for the record."""

    def save(self, folder: Path) -> None:
        """Write the model, `discriminator` beside it, and import.json with the account of every tensor."""
        self.model.save_pretrained(folder)
        if self.discriminator is not None:
            save_discriminator(folder, self.discriminator.config, self.discriminator.network)
        account = {
            "origin": dict(self.origin),
            "tensors_used": self.num_used,
            "left_out": {reason: list(names) for reason, names in self.left_out.items()},
            "notes": list(self.notes),
        }
        (folder / "import.json").write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")


def build_model(config: VQModelConfig, state: Mapping[str, Tensor], *, source: str | Path) -> VQModel:
    """The model of `config` with these weights. Raises ArtifactError naming keys that do not fit."""
    return build_with(lambda: VQModel(config), state, source=source)


def discriminator_from(state: Mapping[str, Tensor], *, source: str | Path) -> ImportedDiscriminator:
    """The PatchGAN that weights `main.*` belong to: its config follows from their shapes.

    Raises ArtifactError where they are not those of a PatchGAN.
    """
    convolutions = sorted(
        int(key.split(".")[1]) for key, value in state.items() if key.endswith("weight") and value.ndim == 4
    )
    first = state.get("main.0.weight")
    if first is None or first.ndim != 4 or len(convolutions) < 3:
        raise ArtifactError(f"{source}: the discriminator there is not a PatchGAN (no main.0.weight of 4x4)")
    norm: Norm = "none"
    if any(key.endswith("running_mean") for key in state):
        norm = "batch"
    elif any(key.endswith("loc") for key in state):
        norm = "actnorm"
    config = PatchGANConfig(channels=len(first), num_layers=len(convolutions) - 2, norm=norm)
    network = PatchGAN(config, first.shape[1])
    load_state(network, state, source=f"{source} (discriminator)")
    return ImportedDiscriminator(network, config)


def shapes_of_levels(state: Mapping[str, Tensor], side: str) -> list[tuple[int, int, int]]:
    """(width, residual blocks, attention blocks) of each level under encoder.down or decoder.up (`side`).

    Raises KeyError where the state has no such levels.
    """
    levels = sorted({int(m[1]) for key in state if (m := re.match(rf"{re.escape(side)}\.(\d+)\.", key))})
    found = []
    for level in levels:
        blocks, attention = (
            {m[1] for key in state if (m := re.match(rf"{re.escape(side)}\.{level}\.{part}\.(\d+)\.", key))}
            for part in ("block", "attn")
        )
        width = len(state[f"{side}.{level}.block.0.conv1.weight"])
        found.append((width, len(blocks), len(attention)))
    return found


def net_from_shapes(state: Mapping[str, Tensor], *, resolution: int = 256) -> dict[str, Any]:
    """Config values of the network whose weights, under our names, are `state`; not its input and quantizer.

    Attention is placed by `resolution`, which no shape tells and which, attention apart, nothing depends on.
    Raises KeyError or ValueError where the shapes are not those of such a network.
    """
    channels, in_channels = (int(side) for side in state["encoder.conv_in.weight"].shape[:2])
    levels = shapes_of_levels(state, "encoder.down")
    blocks = {count for _, count, _ in levels}
    if not levels or any(width % channels for width, _, _ in levels) or len(blocks) != 1:
        raise ValueError("levels of an unknown form")
    return {
        "in_channels": in_channels,
        "resolution": resolution,
        "channels": channels,
        "channel_multipliers": [width // channels for width, _, _ in levels],
        "num_res_blocks": blocks.pop(),
        "attention_resolutions": [resolution // 2**i for i, (_, _, attn) in enumerate(levels) if attn],
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "z_channels": len(state["encoder.conv_out.weight"]),
    }


def grouped(reasons: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    """(reason, name) pairs as reason -> names."""
    result: dict[str, list[str]] = {}
    for reason, name in reasons:
        result.setdefault(reason, []).append(name)
    return {reason: tuple(names) for reason, names in result.items()}
