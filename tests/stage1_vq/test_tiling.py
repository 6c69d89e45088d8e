"""Tiles give what undivided work gives."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peak_memory import peak_bytes
from stage1_vq import VQModel
from stage1_vq.config import VQModelConfig
from stage1_vq.evaluate import reconstruct
from stage1_vq.tiling import TILED_ABOVE, decode, decode_tiled, encode_tiled, in_tiles
from taming.config import build_config
from taming.errors import UserError
from tests.conftest import TINY_MODEL

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three levels, attention in the middle": {"channel_multipliers": [1, 2, 2], "mid_attention": True},
    "attention in a level above": {
        "channel_multipliers": [1, 1, 2], "attention_resolutions": [8], "num_res_blocks": 2,
    },
    "attention at full size": {"attention_resolutions": [16]},
    "patches": {"patch_size": 2},
    "channels last": {"channels": 64, "channel_multipliers": [1, 1]},
    "odd channels": {"z_channels": 7, "in_channels": 5},
}  # fmt: skip


def small_tokenizer(**changes: Any) -> VQModel:
    torch.manual_seed(0)
    model = VQModel(build_config(VQModelConfig, {**TINY_MODEL, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [8, 20])
def test_tiles_are_the_whole_up_to_rounding(kind: str, tile: int) -> None:
    model = small_tokenizer(**KINDS[kind])
    factor = model.config.downsample_factor
    # A picture whose parts differ, so that a tile's own statistics are not the picture's.
    images = torch.randn(2, model.config.in_channels, 40, 24) * torch.linspace(0.1, 3, 40)[:, None]
    codes = torch.randint(16, (2, 40 // factor, 24 // factor)).sort(1).values
    whole = model.decode(codes)
    torch.testing.assert_close(
        decode_tiled(model, codes, tile=max(tile, factor)), whole, atol=2e-5, rtol=1e-4
    )
    assert torch.equal(encode_tiled(model, images, tile=tile), model.encode(images))


def test_a_tile_with_its_own_statistics_would_not_do() -> None:
    """What the bound above is worth: decoding a part by itself is far outside of it."""
    model = small_tokenizer()
    codes = torch.arange(16).repeat_interleave(20).view(1, 16, 20)
    part = model.decode(codes[:, :8])[:, :, :8]
    assert float((part - model.decode(codes)[:, :, :8]).abs().mean()) > 1e-2


def test_files_hold_what_memory_does_not_and_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    temporary = tempfile.TemporaryFile

    def counted(*args: Any, **options: Any) -> Any:
        made.append(1)
        return temporary(*args, dir=tmp_path, **options)

    monkeypatch.setattr(tempfile, "TemporaryFile", counted)
    model = small_tokenizer()
    codes = torch.randint(16, (1, 20, 20))
    small, large = decode_tiled(model, codes, tile=8), decode_tiled(model, codes, tile=1000)
    assert made
    torch.testing.assert_close(small, large, atol=2e-5, rtol=1e-4)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="set TMPDIR"):
        decode_tiled(small_tokenizer(), torch.zeros(1, 20, 20, dtype=torch.int64), tile=8)


def test_output_goes_where_it_is_wanted() -> None:
    model = small_tokenizer()
    codes = torch.randint(16, (1, 6, 5))
    out = torch.empty(1, 3, 12, 10, dtype=torch.float64)
    assert decode_tiled(model, codes, tile=8, out=out) is out
    torch.testing.assert_close(out.float(), model.decode(codes), atol=2e-5, rtol=1e-4)
    with pytest.raises(UserError, match="out has shape"):
        decode_tiled(model, codes, out=out[:, :, 1:])


def test_when_tiles_are_used() -> None:
    assert not in_tiles(512, 512, None)
    assert in_tiles(512, TILED_ABOVE // 512 + 1, None)
    assert in_tiles(8, 8, 4)
    assert not in_tiles(4096, 4096, 0)
    with pytest.raises(UserError, match="tile -1"):
        in_tiles(8, 8, -1)
    model, codes = small_tokenizer(), torch.randint(16, (1, 4, 4))
    assert torch.equal(decode(model, codes), model.decode(codes))
    assert torch.equal(decode(model, codes, tile=4), decode_tiled(model, codes, tile=4))


def test_reconstruction_in_tiles() -> None:
    model = small_tokenizer(mid_attention=True)
    images = torch.rand(1, 3, 24, 16) * 2 - 1
    codes, painted = reconstruct(model, images)
    tiled_codes, tiled = reconstruct(model, images, tile=6)
    assert torch.equal(codes, tiled_codes)
    torch.testing.assert_close(tiled, painted, atol=2e-5, rtol=1e-4)


def test_memory_does_not_grow_with_the_picture() -> None:
    model = small_tokenizer()

    def held(height: int, tile: int) -> int:
        codes = torch.randint(16, (1, height // 2, 8))
        output = 3 * height * 16 * 4
        return peak_bytes(lambda: decode(model, codes, tile=tile)) - output

    assert held(256, 16) < 1.2 * held(32, 16)
    assert held(128, 0) > 2 * held(32, 0)
