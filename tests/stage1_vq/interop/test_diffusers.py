"""diffusers.VQModel reads what is exported, and what it writes is imported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from stage1_vq.interop.diffusers import export_diffusers, import_diffusers
from stage1_vq.interop.diffusers_layout import modern, state_to_diffusers
from stage1_vq.model import VQModel
from taming.errors import ArtifactError, UserError
from tests.end_to_end.test_command_line import taming
from tests.stage1_vq.interop.published import small_model

TABLE = {"codebook_size": 40, "code_dim": 4}
KINDS: dict[str, dict[str, Any]] = {
    "nearest": {"kind": "nearest", **TABLE},
    "l2": {"kind": "nearest", "l2_normalised": True, **TABLE},
    "ema": {"kind": "ema", **TABLE},
    "simvq": {"kind": "simvq", **TABLE},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3]},
    "lfq": {"kind": "lfq", "num_bits": 5},
    "bsq": {"kind": "bsq", "num_bits": 5},
    "ibq": {"kind": "ibq", **TABLE},
    "gumbel": {"kind": "gumbel", **TABLE},
}


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(3)
    return torch.rand(2, 3, 32, 48) * 2 - 1


@torch.no_grad()
def their_codes(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """(codes (B, h, w), pictures) of diffusers itself, by its own two steps."""
    model = diffusers.VQModel.from_pretrained(folder).eval()
    latents = model.encode(images).latents
    codes = model.quantize(latents)[2][2].view(latents.shape[0], *latents.shape[2:])
    return codes, model.decode(latents).sample


@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_pictures_are_the_same(tmp_path: Path, kind: str, images: Tensor):
    model = small_model(quantizer=KINDS[kind])
    report = export_diffusers(model, tmp_path / "out", [images[:1]])
    codes, pictures = their_codes(tmp_path / "out", images)
    expected = model.encode(images)
    assert expected.unique().numel() >= 8
    assert torch.equal(codes, expected)
    torch.testing.assert_close(pictures, model.decode(expected), rtol=0, atol=1e-3)
    assert report.equal_codes == 1
    assert report.picture_difference < 1e-3
    assert (
        json.loads((tmp_path / "out" / "tokenizer.json").read_text())["content_hash"] == model.content_hash()
    )


@pytest.mark.parametrize(
    "change",
    [
        {"attention_resolutions": [16, 8]},
        {"mid_attention": False, "attention_resolutions": []},
        {"channel_multipliers": [1], "attention_resolutions": []},
        {"num_res_blocks": 2, "norm_num_groups": 8, "in_channels": 1},
    ],
)
def test_networks_travel_there_and_back(tmp_path: Path, change: dict[str, Any]):
    model = small_model(quantizer={"kind": "nearest", "beta_on": "codebook", **TABLE}, **change)
    torch.manual_seed(3)
    images = torch.rand(1, model.config.in_channels, 16, 24) * 2 - 1
    export_diffusers(model, tmp_path / "out", [images])
    back = import_diffusers(tmp_path / "out").model
    assert back.state_dict().keys() == model.state_dict().keys()
    assert back.content_hash() == model.content_hash()
    assert torch.equal(back.encode(images), model.encode(images))


def test_diffusers_own_model_is_imported(tmp_path: Path, images: Tensor):
    torch.manual_seed(0)
    theirs = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=2,
        latent_channels=8,
        num_vq_embeddings=32,
        norm_num_groups=8,
        vq_embed_dim=4,
    )
    torch.nn.init.normal_(theirs.quantize.embedding.weight, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    done = taming("vq", "import", "diffusers", tmp_path / "theirs", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    model = VQModel.from_pretrained(tmp_path / "out")
    codes, pictures = their_codes(tmp_path / "theirs", images)
    assert codes.unique().numel() >= 8
    assert torch.equal(model.encode(images), codes)
    torch.testing.assert_close(model.decode(codes), pictures, rtol=0, atol=1e-4)


def test_names_of_older_files_are_known():
    assert (
        modern("encoder.mid_block.attentions.0.proj_attn.bias")
        == "encoder.mid_block.attentions.0.to_out.0.bias"
    )
    assert (
        modern("decoder.up_blocks.0.attentions.1.query.weight")
        == "decoder.up_blocks.0.attentions.1.to_q.weight"
    )
    assert modern("decoder.conv_in.weight") == "decoder.conv_in.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_type": "spatial"}, "norm_type is 'spatial'; only 'group'"),
        ({"act_fn": "relu"}, "act_fn is 'relu'"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL', not a diffusers VQModel"),
        ({"out_channels": 1}, "in_channels is 3 and out_channels 1"),
        ({"block_out_channels": [32, 48, 64]}, "are not multiples of the first"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "one of DownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "attention at different levels"),
        ({"surprise": 1}, "key 'surprise'"),
        ({"num_vq_embeddings": 41}, r"quantize.embedding.weight is \(40, 4\) there and \(41, 4\)"),
    ],
)
def test_folders_that_ours_is_not_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str, images: Tensor
):
    export_diffusers(small_model(quantizer=KINDS["nearest"]), tmp_path / "out", [images])
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        import_diffusers(tmp_path / "out")


def test_missing_files_are_named(tmp_path: Path, images: Tensor):
    with pytest.raises(ArtifactError, match=r"is not a folder with a config\.json"):
        import_diffusers(tmp_path)
    export_diffusers(small_model(), tmp_path / "out", [images])
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"holds neither diffusion_pytorch_model\.safetensors"):
        import_diffusers(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantizer": {"kind": "residual", "codes_per_stage": 4, "code_dim": 4}}, "kind residual"),
        ({"input": "segmentation", "in_channels": 5}, "input is segmentation; it takes pictures"),
        ({"patch_size": 2, "resolution": 32}, "patch_size is 2; it only has 1"),
        ({"channel_multipliers": [2, 2], "attention_resolutions": []}, "channel_multipliers begin with 2"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(ArtifactError, match=message):
        export_diffusers(small_model(**change), tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_taken_back(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
):
    def swapped(state: Any, num_levels: int) -> dict[str, Tensor]:
        result = state_to_diffusers(state, num_levels)
        result["quant_conv.weight"] = result["quant_conv.weight"].flip(0)
        return result

    monkeypatch.setattr("stage1_vq.interop.diffusers.state_to_diffusers", swapped)
    with pytest.raises(ArtifactError, match=r"only [\d.]+% of 192 codes are the same; nothing was written"):
        export_diffusers(small_model(), tmp_path / "out", [images])
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    broken = small_model()
    torch.nn.init.constant_(broken.decoder.conv_out.bias, float("nan"))
    with pytest.raises(ArtifactError, match="pictures differ by nan"):
        export_diffusers(broken, tmp_path / "out", [images])
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs diffusers .* pip install 'taming-toolkit\[interop\]'"):
        export_diffusers(small_model(), tmp_path / "out", [images])
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path):
    small_model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    done = taming(
        "vq", "export", tmp_path / "model", "--format", "diffusers", "--out", out, "--num-pictures", 2
    )
    assert done.returncode == 0, done.stderr
    assert "100.0000%" in done.stdout
    for arguments, message in (
        (("--format", "gguf", "--out", tmp_path / "x"), "no export format 'gguf'; there are diffusers, onnx"),
        (("--format", "diffusers", "--out", out), "is not an empty folder"),
        (("--format", "diffusers", "--out", tmp_path / "x", "--size", "18x20"), "give 16x20"),
    ):
        done = taming("vq", "export", tmp_path / "model", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
