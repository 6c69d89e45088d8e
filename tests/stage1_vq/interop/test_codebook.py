"""The codebook as files that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

from stage1_vq.interop.codebook import export_codebook
from taming.errors import ArtifactError
from tests.stage1_vq.interop.published import small_model

TABLE = {"codebook_size": 40, "code_dim": 4}


@pytest.mark.parametrize(
    ("quantizer", "search"),
    [
        ({"kind": "nearest", **TABLE}, "euclidean"),
        ({"kind": "nearest", "l2_normalised": True, **TABLE}, "cosine"),
        ({"kind": "simvq", **TABLE}, "euclidean"),
        ({"kind": "bsq", "num_bits": 5}, "cosine"),
        ({"kind": "fsq", "levels": [5, 4]}, None),
        ({"kind": "gumbel", **TABLE}, None),
        ({"kind": "residual", "codes_per_stage": 4, "code_dim": 4}, None),
    ],
)
def test_rows_are_what_codes_decode_from(tmp_path: Path, quantizer: dict[str, Any], search: str | None):
    model = small_model(quantizer=quantizer)
    torch.manual_seed(3)
    images = torch.rand(1, 3, 16, 24) * 2 - 1
    report = export_codebook(model, tmp_path / "out", [images])
    rows = np.load(tmp_path / "out" / "codebook.npy")
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, load_file(tmp_path / "out" / "codebook.safetensors")["codebook"])
    np.testing.assert_array_equal(rows, model.codebook.numpy())
    facts = json.loads((tmp_path / "out" / "codebook.json").read_text())
    assert facts["search"] == search
    assert facts["content_hash"] == model.content_hash()
    assert report.equal_codes == (None if search is None else 1)
    if search == "cosine":
        latents = F.normalize(model.latents(images).detach(), dim=1)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
        found = torch.einsum("bdhw,kd->bhwk", latents, torch.from_numpy(rows)).argmax(-1)
        assert torch.equal(found, model.encode(images))


def test_a_codebook_that_decodes_to_something_else_is_taken_back(tmp_path: Path):
    model = small_model()
    torch.nn.init.constant_(model.decoder.conv_out.bias, float("nan"))
    with pytest.raises(ArtifactError, match="pictures differ by nan; nothing was written"):
        export_codebook(model, tmp_path / "out", [torch.zeros(1, 3, 16, 16)])
    assert not (tmp_path / "out").exists()
