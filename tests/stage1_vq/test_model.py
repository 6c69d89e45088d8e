"""The tokenizer: shapes, what it refuses, and its life on disk."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stage1_vq.config import VQModelConfig
from stage1_vq.model import VQModel
from taming.config import build_config, read_yaml, shipped_configs
from taming.errors import ArtifactError, ConfigError, UserError


def small_config(**changes: object) -> VQModelConfig:
    values = {
        "resolution": 16,
        "channels": 8,
        "channel_multipliers": [1, 2, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [4],
        "z_channels": 8,
        "norm_num_groups": 4,
        "quantizer": {"kind": "nearest", "codebook_size": 12, "code_dim": 4},
    }
    return build_config(VQModelConfig, values | changes)


@pytest.fixture
def model() -> VQModel:
    torch.manual_seed(0)
    return VQModel(small_config()).eval()


def test_codes_and_pictures_have_their_shapes(model: VQModel):
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = model.encode(images)
    assert codes.shape == (2, 4, 6)
    assert codes.dtype == torch.int64
    assert model.decode(codes).shape == images.shape
    assert model.codebook.shape == (12, 4)
    assert (model.spec.codebook_size, model.spec.code_dim, model.spec.downsample_factor) == (12, 4, 4)


def test_decoding_the_codes_is_the_reconstruction(model: VQModel):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        output = model(images)
    assert torch.equal(model.encode(images), output.quantizer.indices)
    assert_close(model.decode(output.quantizer.indices), output.reconstruction, rtol=1e-5, atol=1e-6)


def test_a_picture_does_not_depend_on_its_batch(model: VQModel):
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(model.encode(images)[1:2], model.encode(images[1:2]))


def test_every_parameter_gets_a_gradient():
    model = VQModel(small_config(dropout=0.1)).train()
    output = model(torch.rand(2, 3, 16, 16) * 2 - 1)
    (output.reconstruction.square().mean() + output.quantizer.loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_recomputing_changes_memory_not_gradients(layout: torch.memory_format):
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).contiguous(memory_format=layout)
    gradients = []
    for recompute in (True, False):
        torch.manual_seed(0)
        model = VQModel(small_config(recompute=recompute)).double().train().to(memory_format=layout)
        model.quantize.float()
        z = model.encoder(images.double())
        painted = model.decoder(z)
        (painted.images * torch.linspace(-1, 1, 16).double()).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 60
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9, msg=name)


def test_no_attention_in_the_middle_where_it_is_off():
    names = VQModel(small_config(mid_attention=False, attention_resolutions=[])).state_dict()
    assert not [name for name in names if "attn" in name]


def test_attention_stands_where_the_configured_resolution_says():
    names = VQModel(small_config(attention_resolutions=[8])).state_dict()
    assert {name.split(".attn")[0] for name in names if ".attn." in name} == {
        "encoder.down.1",
        "decoder.up.1",
    }


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(1, 3, 250, 256),
            "image height 250 is not divisible by the downsample factor 4; crop to 248",
        ),
        (torch.zeros(1, 3, 16, 2), "image width 2 is not divisible by the downsample factor 4; pad to 4"),
        (torch.zeros(3, 16, 16), r"takes \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 16, 16), r"takes \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8 / 127.5 - 1"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(model: VQModel, images: torch.Tensor, message: str):
    with pytest.raises(UserError, match=message):
        model.encode(images)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.full((1, 2, 2), 12), r"codes lie in \[12, 12\]; this codebook has codes 0 to 11"),
        (torch.full((1, 2, 2), -1), "codes 0 to 11"),
        (torch.zeros(2, 2, dtype=torch.int64), r"int64 \(B, h, w\)"),
        (torch.zeros(1, 2, 2), r"int64 \(B, h, w\)"),
        (torch.zeros(0, 2, 2, dtype=torch.int64), "empty"),
    ],
)
def test_codes_that_do_not_fit_are_refused(model: VQModel, codes: torch.Tensor, message: str):
    with pytest.raises(UserError, match=message):
        model.decode(codes)


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="norm_num_groups 3 does not divide channels 8"):
        small_config(norm_num_groups=3)
    with pytest.raises(ConfigError, match=r"attention_resolutions 5 .* the levels have 16, 8, 4"):
        small_config(attention_resolutions=[5])


def test_saved_model_is_the_same_model(model: VQModel, tmp_path):
    model.save_pretrained(tmp_path / "run" / "model")
    for source in (tmp_path / "run" / "model", tmp_path / "run"):
        loaded = VQModel.from_pretrained(source)
        assert not loaded.training
        assert loaded.config == model.config
        assert loaded.content_hash() == model.content_hash()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(images), model.encode(images))


def test_content_hash_sees_every_weight(model: VQModel):
    before = model.content_hash()
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    assert model.content_hash() != before


def test_a_model_of_another_architecture_is_refused(model: VQModel, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"z_channels": 8', '"z_channels": 12'))
    with pytest.raises(ArtifactError, match="does not fit its config"):
        VQModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["photos_64", "photos_256", "scenes_64"])
def test_half_precision_computes_the_same_in_shipped_models(name: str) -> None:
    """Training runs under autocast, users in fp32: a kernel that is wrong in one must not pass unseen."""
    values = read_yaml(shipped_configs("stage1")[name])["model"]
    torch.manual_seed(0)
    model = VQModel(build_config(VQModelConfig, values)).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        exact, codes = model.latents(images), model.encode(images)
        picture = model.decode(codes)
        with torch.autocast("cpu", torch.bfloat16):
            half, painted = model.latents(images), model.decode(codes)
    assert float((exact - half.float()).norm() / exact.norm()) < 0.05
    assert float((picture - painted).norm() / picture.norm()) < 0.1


@pytest.mark.parametrize(("patch_size", "multipliers"), [(2, (1, 1)), (4, (1,))])
def test_patches_of_pixels_enter_and_leave_as_one_position(patch_size: int, multipliers: tuple[int, ...]):
    model = VQModel(small_config(patch_size=patch_size, channel_multipliers=multipliers)).eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = model.encode(images)
    assert model.spec.downsample_factor == 4
    assert codes.shape == (2, 4, 6)
    assert model.decode(codes).shape == images.shape
    output = model(images)
    wanted = torch.randn_like(output.reconstruction)
    (expected,) = torch.autograd.grad(output.reconstruction, model.last_layer, wanted)
    found = model.decoder.last_gradient(output.features, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
