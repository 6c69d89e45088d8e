"""safetensors files, written tensor by tensor: hashed on the way, and never a second time in memory.

The format (huggingface.co/docs/safetensors) is eight bytes with the header's length, little-endian; the
header, {"NAME": {"dtype", "shape", "data_offsets"}} in JSON, padded with spaces; then the tensors' bytes.
Wide types come first, so that every tensor lies aligned. The library's own writer refuses tensors that
share their memory, so that all would have to be copied first, and gives no hash.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip
"""The format's names of types."""
CHUNK, SYNC_EVERY = 2**20, 2**26
"""Bytes that are written at a time, and after which the disk is waited for."""


class Written(NamedTuple):
    """A file as it should lie on the disk."""

    size: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Written:
    """Write tensors, of any device and layout, and wait until the disk holds them.

    They may share memory: each is written whole. Raises OSError (a full disk, say), with part of the file
    left behind.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest, size, unsynced = hashlib.sha256(), 0, 0
    # Hashing takes a processor and writing takes the disk: both go on at once, at most one tensor apart.
    with ThreadPoolExecutor(1) as hasher, path.open("wb") as file:
        hashed: Future[None] | None = None
        for part in _parts(tensors, order, metadata):
            before, hashed = hashed, hasher.submit(digest.update, part)
            for start in range(0, len(part), CHUNK):
                unsynced += file.write(part[start : start + CHUNK])
                if unsynced >= SYNC_EVERY:
                    file.flush()
                    os.fsync(file.fileno())
                    unsynced = 0
            size += len(part)
            if before is not None:
                before.result()
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take in a file, but for its header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _parts(
    tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str] | None
) -> Iterator[memoryview]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
