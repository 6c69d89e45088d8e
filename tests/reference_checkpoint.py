"""Reference cases: small models with random weights in the published format, and what they compute.

The cases that matter most are committed in tests/reference (weights as safetensors, without the causal
masks, which hold nothing); all are in ../shared/reference, as pickled Lightning checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import Tensor

from stage1_vq.interop.checkpoint import read_checkpoint, tensors_of
from stage1_vq.interop.imported import Imported
from stage1_vq.interop.published_config import Part
from stage1_vq.interop.taming_transformers import import_taming_transformers

COMMITTED = Path(__file__).parent / "reference"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "reference"


def reference_paths(name: str) -> tuple[Path, Path, Path]:
    """(checkpoint, model.yaml, io.safetensors) of a reference case; skips the test where it is absent."""
    committed = (COMMITTED / name).is_dir()
    folder = COMMITTED / name if committed else SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no reference case at {folder}")
    weights = "state.safetensors" if committed else "model.ckpt"
    return folder / weights, folder / "model.yaml", folder / "io.safetensors"


def import_reference(name: str, part: Part | None = None) -> tuple[Imported, dict[str, Tensor]]:
    """A tokenizer of a reference case by our importer, and the case's inputs and outputs."""
    checkpoint, config, io = reference_paths(name)
    return import_taming_transformers(checkpoint, config=config, part=part), load_file(io)


def load_reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """(model.yaml, state dict, inputs and outputs) of a reference case; skips the test where it is absent."""
    checkpoint, config, io = reference_paths(name)
    return yaml.safe_load(config.read_text(encoding="utf-8")), load_checkpoint(checkpoint), load_file(io)


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a published checkpoint, read without running any of its code."""
    return tensors_of(read_checkpoint(path), path, "state_dict")
