"""LlamaGen's tokenizer against transformers' own implementation of that network (Janus uses it)."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import JanusVQVAE, JanusVQVAEConfig

from stage1_vq.interop.llamagen import import_llamagen


def llamagen_name(key: str) -> str:
    """Both list the decoder's levels in running order; only the words differ."""
    key = re.sub(r"^(encoder|decoder)\.(?:down|up)\.(\d+)\.", r"\1.conv_blocks.\2.", key)
    key = re.sub(r"(conv_blocks\.\d+)\.block\.", r"\1.res.", key)
    for index, part in enumerate(("block_1", "attn_1", "block_2")):
        key = key.replace(f".mid.{part}.", f".mid.{index}.")
    return key


def test_codes_and_pictures_are_those_of_transformers(tmp_path: Path):
    torch.manual_seed(0)
    theirs = JanusVQVAE(
        JanusVQVAEConfig(
            embed_dim=4,
            num_embeddings=24,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 2, 2],
            num_res_blocks=2,
            num_patches=6,
            out_channels=3,
        )
    ).eval()
    with torch.no_grad():
        # Its encoder compares lengths as well: codes of length one, which both then search alike.
        theirs.quantize.embedding.weight.copy_(F.normalize(torch.randn(24, 4), dim=1))
    torch.save({"model": {llamagen_name(k): v for k, v in theirs.state_dict().items()}}, tmp_path / "vq.pt")
    ours = import_llamagen(tmp_path / "vq.pt").model
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    with torch.no_grad():
        latents = theirs.quant_conv(theirs.encoder(images))
        codes = theirs.quantize(latents)[2].view(2, 6, 6)
        pictures = theirs.decode(codes.flatten(1))
    assert codes.unique().numel() >= 6
    assert_close(ours.latents(images).detach(), latents, rtol=0, atol=1e-4)
    assert torch.equal(ours.encode(images), codes)
    assert_close(ours.decode(codes), pictures, rtol=0, atol=1e-4)
