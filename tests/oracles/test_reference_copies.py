"""The committed reference cases are those of ../shared/reference."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.reference_checkpoint import COMMITTED, SHARED, load_checkpoint, load_reference


@pytest.mark.parametrize("name", sorted(path.name for path in COMMITTED.iterdir()))
def test_copies_are_exact(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("../shared is not here")
    _, state, io = load_reference(name)
    original = load_checkpoint(SHARED / name / "model.ckpt")
    assert {key for key in original if not key.endswith("attn.mask")} == state.keys()
    assert all(torch.equal(original[key], value) for key, value in state.items())
    shared_io = load_file(SHARED / name / "io.safetensors")
    assert all(torch.equal(shared_io[key], value) for key, value in io.items())
