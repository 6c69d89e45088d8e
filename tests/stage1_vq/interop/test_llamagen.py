"""Import of LlamaGen tokenizers: their names, their normalised codebook, their strictness."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from stage1_vq.interop.llamagen import import_llamagen, our_name
from taming.errors import ArtifactError
from taming.gan.discriminators.patchgan import PatchGAN, PatchGANConfig
from tests.end_to_end.test_command_line import taming
from tests.stage1_vq.interop.published import llamagen_state, small_model

L2 = {"kind": "nearest", "codebook_size": 24, "code_dim": 4, "l2_normalised": True}


def test_names_are_those_of_the_published_file():
    """Names of vq_ds16 (five levels), read in LlamaGen's source, and what is ours."""
    for theirs, ours in {
        "encoder.conv_in.weight": "encoder.conv_in.weight",
        "encoder.conv_blocks.1.res.0.norm1.weight": "encoder.down.1.block.0.norm1.weight",
        "encoder.conv_blocks.0.downsample.conv.bias": "encoder.down.0.downsample.conv.bias",
        "encoder.conv_blocks.4.attn.1.proj_out.weight": "encoder.down.4.attn.1.proj_out.weight",
        "encoder.mid.0.conv1.weight": "encoder.mid.block_1.conv1.weight",
        "encoder.mid.1.q.weight": "encoder.mid.attn_1.q.weight",
        "decoder.mid.2.conv2.bias": "decoder.mid.block_2.conv2.bias",
        "decoder.conv_blocks.0.res.2.conv1.weight": "decoder.up.4.block.2.conv1.weight",
        "decoder.conv_blocks.0.upsample.conv.weight": "decoder.up.4.upsample.conv.weight",
        "decoder.conv_blocks.4.res.0.nin_shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.norm_out.weight": "decoder.norm_out.weight",
        "quantize.embedding.weight": "quantize.embedding.weight",
        "post_quant_conv.bias": "post_quant_conv.bias",
    }.items():
        assert our_name(theirs, 5) == ours


def test_codes_and_pictures_are_the_models(tmp_path: Path):
    model = small_model(quantizer=L2)
    with torch.no_grad():  # stored codes have any length; they are normalised at use
        model.quantize.embedding.weight.mul_(torch.linspace(0.5, 3, 24)[:, None])
    second = PatchGAN(PatchGANConfig(channels=4, num_layers=2), 3)
    averaged = {key: value + 1 for key, value in llamagen_state(model).items()}
    torch.save(
        {
            "model": llamagen_state(model),
            "ema": averaged,
            "discriminator": second.state_dict(),
            "steps": 5,
            "args": argparse.Namespace(vq_model="VQ-16", data_path=tmp_path),
        },
        tmp_path / "vq.pt",
    )
    result = import_llamagen(tmp_path / "vq.pt")
    assert result.model.config.quantizer.l2_normalised
    assert result.model.config.quantizer.beta_on == "commitment"
    assert list(result.left_out.values()) == [("quantize.codebook_used",)]
    assert result.discriminator is not None
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = result.model.encode(images)
    assert codes.unique().numel() > 8
    # Their procedure in full: both sides of length one, the nearest row, then that row.
    with torch.no_grad():
        latents = F.normalize(model.latents(images), dim=1).permute(0, 2, 3, 1)
        table = F.normalize(model.quantize.embedding.weight, dim=1)
        distances = (latents[..., None, :] - table).square().sum(-1)
        expected = model.decoder(
            model.post_quant_conv(table[distances.argmin(-1)].permute(0, 3, 1, 2))
        ).images
    assert torch.equal(codes, distances.argmin(-1))
    torch.testing.assert_close(result.model.decode(codes), expected, rtol=0, atol=1e-4)
    weight = import_llamagen(tmp_path / "vq.pt", ema=True).model.decoder.conv_in.weight
    assert torch.equal(weight, model.decoder.conv_in.weight + 1)
    out = tmp_path / "out"
    done = taming("vq", "import", "llamagen", tmp_path / "vq.pt", "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "discriminator" / "model.safetensors").is_file()


def test_what_is_not_one_is_refused(tmp_path: Path):
    model = small_model(quantizer=L2)
    path = tmp_path / "vq.pt"
    torch.save(model.state_dict(), path)
    with pytest.raises(ArtifactError, match=r"no decoder\.conv_blocks"):
        import_llamagen(path)
    state = llamagen_state(model)
    for change, message in (
        ({"encoder.mid.3.conv1.weight": torch.zeros(1)}, r"not expected \(encoder.mid.3.conv1.weight\)"),
        ({"decoder.conv_in.weight": torch.zeros(1)}, r"decoder.conv_in.weight is \(1,\) there"),
    ):
        torch.save({"model": state | change}, path)
        with pytest.raises(ArtifactError, match=message):
            import_llamagen(path)
    torch.save({"model": {k: v for k, v in state.items() if k != "encoder.mid.1.q.bias"}}, path)
    with pytest.raises(ArtifactError, match=r"1 keys are missing \(encoder.mid.attn_1.q.bias\)"):
        import_llamagen(path)
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith("encoder.conv_in")}}, path)
    with pytest.raises(ArtifactError, match=r"missing 'encoder.conv_in.weight'"):
        import_llamagen(path)
    with pytest.raises(ArtifactError, match="leave --ema out"):
        import_llamagen(path, ema=True)
