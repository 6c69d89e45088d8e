"""Loads a case of ../shared/reference: small models in the published format with what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


class _InertCheckpointCallback:
    """Stands in for the one class that Lightning checkpoints name; it only holds what is put in it."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(model.yaml, state dict, inputs and outputs) of a reference case; skips the test where it is absent."""
    folder = REFERENCE / name
    if not folder.is_dir():
        pytest.skip(f"no reference case at {folder}")
    config = yaml.safe_load((folder / "model.yaml").read_text(encoding="utf-8"))
    callback = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    with torch.serialization.safe_globals([(_InertCheckpointCallback, callback)]):
        checkpoint = torch.load(folder / "model.ckpt", map_location="cpu", weights_only=True)
    return config, checkpoint["state_dict"], load_file(folder / "io.safetensors")
