"""1024x1024 pixels by the command line, from a tokenizer of factor 8."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stage1_vq.tiling
from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage2_ar.cli import app
from taming.config import build_config
from tests.conftest import TINY_MODEL, make_pipeline


@pytest.mark.slow
def test_a_large_picture_is_painted_in_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokenizer = VQModel(
        build_config(
            VQModelConfig, {**TINY_MODEL, "channel_multipliers": [1, 1, 1, 2], "mid_attention": True}
        )
    ).eval()
    pipe = make_pipeline(tokenizer, {"kind": "none"}, num_layers=1, attention_window=[1, 2])
    pipe.save_pretrained(tmp_path / "model")
    tiled: list[tuple[int, ...]] = []
    decode_tiled = stage1_vq.tiling.decode_tiled

    def watched(tokenizer: VQModel, codes: torch.Tensor, *, tile: int) -> torch.Tensor:
        tiled.append(tuple(codes.shape))
        images = decode_tiled(tokenizer, codes, tile=tile)
        torch.testing.assert_close(images, tokenizer.decode(codes), atol=1e-4, rtol=1e-4)
        return images

    monkeypatch.setattr(stage1_vq.tiling, "decode_tiled", watched)
    places = ["sample", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*places, "--num", "1", "--size", "1024", "--device", "cpu"])
    assert result.exception is None, result.exception
    assert tiled == [(1, 128, 128)]
    with Image.open(tmp_path / "out/0000.png") as image:
        assert image.size == (1024, 1024)
    facts = json.loads((tmp_path / "out/0000.json").read_text())
    assert (facts["height"], facts["width"]) == (1024, 1024)
