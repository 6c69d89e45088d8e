"""Every quantizer against vector-quantize-pytorch, the published modules' results, or a closed form."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from stage1_vq.config import VQModelConfig
from stage1_vq.model import VQModel
from tests.reference_checkpoint import load_reference


def test_published_gumbel_model_gives_its_own_codes_and_pictures():
    published, state, io = load_reference("gumbel_vqgan")
    params = published["model"]["params"]
    net = params["ddconfig"]
    model = VQModel(
        VQModelConfig(
            resolution=net["resolution"],
            channels=net["ch"],
            channel_multipliers=net["ch_mult"],
            num_res_blocks=net["num_res_blocks"],
            attention_resolutions=net["attn_resolutions"],
            z_channels=net["z_channels"],
            quantizer={
                "kind": "gumbel",
                "codebook_size": params["n_embed"],
                "code_dim": params["embed_dim"],
                "kl_weight": params["kl_weight"],
            },
        )
    )
    model.load_state_dict(state)
    assert torch.equal(model.encode(io["image"]), io["codes"])  # in training mode as well
    model.eval()
    with torch.no_grad():
        assert_close(model.quantize.proj(model.latents(io["image"])), io["logits"], rtol=0, atol=1e-4)
        output = model(io["image"])
    assert torch.equal(output.quantizer.indices, io["codes"])
    assert_close(output.reconstruction, io["reconstruction"], rtol=0, atol=1e-4)
    assert_close(model.decode(io["codes"]), io["reconstruction"], rtol=0, atol=1e-4)
