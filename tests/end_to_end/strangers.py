"""What strangers' files are made of: payloads, headers that lie, and plain pictures."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.end_to_end.test_command_line import refused


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def pickles(canary: Path) -> dict[str, bytes]:
    """The ways in which checkpoints are pickled."""
    archive, old = io.BytesIO(), io.BytesIO()
    content = {"state_dict": {"a": torch.zeros(1)}, "model": {"a": torch.zeros(1)}, "x": Payload(canary)}
    torch.save(content, archive)
    torch.save(content, old, _use_new_zipfile_serialization=False)
    return {"zip": archive.getvalue(), "old": old.getvalue(), "bare": pickle.dumps(Payload(canary))}


def sampled(model: Path, work: Path) -> str:
    """The line that says why a pipeline does not sample."""
    return refused("ar", "sample", model, "--class", 1, "--out", work / "out")


def safetensors_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


def tensor_header(shape: list[int], offsets: list[int]) -> bytes:
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    return safetensors_header(json.dumps({"a": tensor}).encode())


def write(path: Path, content: bytes | str | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def picture(path: Path, size: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([*path.name.encode()]).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path
