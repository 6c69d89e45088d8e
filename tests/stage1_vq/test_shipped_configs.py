"""Every shipped config builds, dry-runs, says what it is, and the published ones are what was published."""

from __future__ import annotations

from pathlib import Path

import pytest

from stage1_vq.config import VQTrainConfig
from stage1_vq.train import describe
from taming.config import load_config, shipped_configs

CONFIGS = sorted(shipped_configs("stage1"))
# Name: factor, codes, code_dim, z_channels, attention, batch, start of the discriminator, its weight.
PUBLISHED = {
    "imagenet_f16_1024": (16, 1024, 256, 256, (16,), 12, 250001, 0.8),
    "imagenet_f16_16384": (16, 16384, 256, 256, (16,), 12, 250001, 0.8),
    "openimages_gumbel_f8_8192": (8, 8192, 256, 256, (32,), 12, 250001, 0.8),
    "faceshq_f16_1024": (16, 1024, 256, 256, (16,), 3, 30001, 0.8),
    "depth_f16_1024": (16, 1024, 256, 256, (16,), 3, 50001, 0.75),
    "coco_segmentation_f16_1024": (16, 1024, 256, 256, (16,), 12, None, None),
    "sflckr_segmentation_f16_1024": (16, 1024, 256, 256, (16,), 12, None, None),
    "ade20k_segmentation_f16_1024": (16, 1024, 256, 256, (16,), 12, None, None),
    "custom_f16_1024": (16, 1024, 256, 256, (16,), 5, 10000, 0.8),
    "openimages_f4_8192": (4, 8192, 3, 3, (), 8, 250001, 0.75),
    "openimages_f4_noattn_8192": (4, 8192, 3, 3, (), 8, 11, 0.75),
    "openimages_f8_16384": (8, 16384, 4, 4, (32,), 10, 250001, 0.75),
    "openimages_f8_256": (8, 256, 4, 4, (32,), 10, 250001, 0.75),
    "openimages_f16_16384": (16, 16384, 8, 8, (16,), 14, 250001, 0.75),
}


def loaded(name: str) -> VQTrainConfig:
    values = Path(shipped_configs("stage1")[name]).read_text()
    overrides = ["data.root=/photos"] if "kind: folder" in values else []
    return load_config(VQTrainConfig, name, overrides, group="stage1")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_builds_and_says_what_it_is(name: str) -> None:
    config = loaded(name)
    assert 20 < len(config.description) < 111
    # A small base keeps the dry run quick; what belongs together is checked all the same.
    narrow = config.model.model_copy(update={"channels": config.model.norm_num_groups})
    facts = describe(config.model_copy(update={"model": narrow}))
    assert f"(f{config.model.downsample_factor})" in facts["latent grid"]
    assert facts["batch"].startswith(f"{config.training.batch_size} pictures")


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_is_the_published_setting(name: str) -> None:
    factor, codes, dim, z_channels, attention, batch, start, weight = PUBLISHED[name]
    config = loaded(name)
    model, quantizer, second = config.model, config.model.quantizer, config.discriminator
    assert (model.downsample_factor, model.resolution, model.channels) == (factor, 256, 128)
    assert (quantizer.codebook_size, quantizer.code_dim, model.z_channels) == (codes, dim, z_channels)
    assert (model.attention_resolutions, model.num_res_blocks, model.dropout) == (attention, 2, 0.0)
    assert model.mid_attention == ("noattn" not in name)
    assert config.training.batch_size == batch
    assert config.optimizer.learning_rate == pytest.approx(4.5e-6 * batch)
    assert config.optimizer.betas == (0.5, 0.9)
    if "gumbel" in name:
        assert (quantizer.kind, quantizer.kl_weight) == ("gumbel", 1e-8)
        assert quantizer.temperature(0, 1) == 0.9
        assert quantizer.temperature(1_000_001, 1) == pytest.approx(1e-6)
    else:
        assert (quantizer.beta, quantizer.beta_on) == (0.25, "codebook")
    if start is None:
        assert second is None
        assert (config.loss.reconstruction, config.loss.perceptual_weight) == ("bce", 0)
        labels = {"coco": 183, "sflckr": 182, "ade20k": 151}[name.partition("_")[0]]
        assert model.in_channels == labels
    else:
        assert (second.start_step, second.weight, second.weight_mode, second.loss) == (
            start,
            weight,
            "adaptive",
            "hinge",
        )
        assert second.network.kind == "patchgan"
        assert config.loss.perceptual_weight == 1.0
        assert model.in_channels == (1 if "depth" in name else 3)


def test_every_published_setting_is_shipped() -> None:
    assert PUBLISHED.keys() <= set(CONFIGS)
