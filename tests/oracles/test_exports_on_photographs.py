"""Exports on photographs (../shared/data/photos): diffusers.VQModel and ONNX Runtime at 96x128."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_vq.interop.diffusers import export_diffusers
from stage1_vq.interop.exported import comparison_inputs
from stage1_vq.interop.onnx import export_onnx
from tests.stage1_vq.interop.published import small_model, spread_codes

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"
TABLE = {"codebook_size": 1024, "code_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "nearest": {"kind": "nearest", **TABLE},
    "l2": {"kind": "nearest", "l2_normalised": True, **TABLE},
    "ema": {"kind": "ema", **TABLE},
    "simvq": {"kind": "simvq", **TABLE},
    "fsq": {"kind": "fsq", "levels": [8, 5, 5, 5]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_photographs(tmp_path: Path, kind: str):
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs at {PHOTOS}")
    changes = {"resolution": 64, "attention_resolutions": [16], "z_channels": 32}
    model = small_model(quantizer=KINDS[kind], **changes)
    inputs = comparison_inputs(model, str(PHOTOS), (96, 128), 50)
    spread_codes(model, torch.cat(inputs))
    report = export_diffusers(model, tmp_path / "diffusers", inputs)
    assert report.pictures == 50
    assert report.codes_in_use > 900
    # A latent as near to two codes as fp32 can tell may fall either way: at most one of 38400 cells did.
    assert report.equal_codes is not None
    assert report.equal_codes >= 0.9999
    assert report.picture_difference < 1e-3
    report = export_onnx(model, tmp_path / "onnx", inputs)
    assert report.equal_codes is not None
    assert report.equal_codes >= 0.999
    assert report.picture_difference < 1e-3
