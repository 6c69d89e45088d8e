"""Our writer of safetensors against the library's reader."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from taming.tensor_file import NAMES, tensor_bytes, write_tensors


def test_the_library_reads_every_type_and_layout(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in NAMES}
    tensors |= {
        "a view of shared": shared[2:6],
        "shared": shared,
        "transposed": shared.reshape(3, 4).T,
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "with gradient": torch.randn(3, requires_grad=True),
        "odd bytes": torch.tensor([True, False, True]),
    }
    path = tmp_path / "file.safetensors"
    written = write_tensors(path, tensors, metadata={"format": "pt"})
    data = path.read_bytes()
    assert written == (len(data), hashlib.sha256(data).hexdigest())
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert read[name].shape == value.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), (
            name
        )
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert 0 < len(data) - tensor_bytes(tensors) < 4096


def test_no_tensors_are_a_file_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file.safetensors", {})
    assert load_file(tmp_path / "file.safetensors") == {}


def test_large_tensors_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("taming.tensor_file.CHUNK", 7)
    path = tmp_path / "file.safetensors"
    value = torch.randn(50)
    written = write_tensors(path, {"value": value})
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(load_file(path)["value"], value)
