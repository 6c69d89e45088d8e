"""Reference cases: small models with random weights in the published format, and what they compute.

The cases that matter most are committed in tests/reference (weights as safetensors, without the causal
masks, which hold nothing); all are in ../shared/reference, as pickled Lightning checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

COMMITTED = Path(__file__).parent / "reference"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"


class _InertCheckpointCallback:
    """Stands in for the one class that Lightning checkpoints name; it only holds what is put in it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(model.yaml, state dict, inputs and outputs) of a reference case; skips the test where it is absent."""
    committed = (COMMITTED / name).is_dir()
    folder = COMMITTED / name if committed else SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no reference case at {folder}")
    config = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    state = load_file(folder / "state.safetensors") if committed else load_checkpoint(folder / "model.ckpt")
    return config, state, load_file(folder / "io.safetensors")


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint, read without running any of its code."""
    callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    with torch.serialization.safe_globals([(_InertCheckpointCallback, callback)]):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = checkpoint["state_dict"]
    return state
