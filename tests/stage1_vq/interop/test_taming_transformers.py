"""Import of published checkpoints: what is used, what is left out and why, and what is refused."""

from __future__ import annotations

import argparse
import fractions
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.testing import assert_close

from stage1_vq import VQModel
from stage1_vq.interop.taming_transformers import import_taming_transformers
from taming.errors import ArtifactError, ConfigError, UserError
from taming.gan.discriminators.patchgan import PatchGAN, PatchGANConfig
from taming.gan.discriminators.saved import load_discriminator
from tests.end_to_end.test_command_line import taming
from tests.stage1_vq.interop.published import published_yaml, small_model, write_published

LDM = "ldm.models.autoencoder.VQModel"


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.rand(2, 3, 16, 24) * 2 - 1


def test_every_tensor_is_used_or_left_out_by_name(tmp_path: Path, images: torch.Tensor):
    model = small_model()
    second = PatchGAN(PatchGANConfig(channels=4, num_layers=2), 3)
    state = model.state_dict() | {
        **{f"loss.discriminator.{key}": value for key, value in second.state_dict().items()},
        "loss.perceptual_loss.net.slice1.0.weight": torch.zeros(2),
        "colorize": torch.zeros(3, 7, 1, 1),
        "model_ema.decay": torch.ones(()),
    }
    checkpoint, config = write_published(tmp_path, state, published_yaml(model))
    result = import_taming_transformers(checkpoint, config=config)
    left = {name for names in result.left_out.values() for name in names}
    assert left == {"loss.perceptual_loss.net.slice1.0.weight", "colorize", "model_ema.decay"}
    assert result.num_used + len(left) == len(state)
    result.save(tmp_path / "out")
    loaded = VQModel.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert model.encode(images).unique().numel() > 8
    assert torch.equal(loaded.decode(loaded.encode(images)), model.decode(model.encode(images)))
    config = PatchGANConfig(channels=4, num_layers=2)
    another = PatchGAN(config, 3)
    assert load_discriminator(tmp_path / "out", another, config) is None
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in another.state_dict().items())
    account = json.loads((tmp_path / "out" / "import.json").read_text())
    assert account["tensors_used"] == result.num_used
    assert len(account["origin"]["sha256"]) == 64


def test_a_discriminator_with_actnorm_is_known_by_its_names(tmp_path: Path):
    model = small_model()
    second = PatchGAN(PatchGANConfig(channels=4, num_layers=3, norm="actnorm"), 3)
    state = {f"loss.discriminator.{key}": value for key, value in second.state_dict().items()}
    checkpoint, config = write_published(tmp_path, model.state_dict() | state, published_yaml(model))
    found = import_taming_transformers(checkpoint, config=config).discriminator
    assert found is not None
    assert (found.config.norm, found.config.num_layers) == ("actnorm", 3)
    state["loss.discriminator.main.0.weight"] = torch.zeros(4)
    write_published(tmp_path, model.state_dict() | state, published_yaml(model))
    with pytest.raises(ArtifactError, match="the discriminator there is not a PatchGAN"):
        import_taming_transformers(checkpoint, config=config)


def test_the_published_loss_is_that_of_the_weights(tmp_path: Path):
    model = small_model()
    loss = {"target": "x.VQLPIPSWithDiscriminator", "params": {"codebook_weight": 2.0, "n_classes": 24}}
    paths = write_published(tmp_path, model.state_dict(), published_yaml(model, lossconfig=loss))
    quantizer = import_taming_transformers(paths[0], config=paths[1]).model.config.quantizer
    assert (quantizer.beta_on, quantizer.beta, quantizer.loss_weight) == ("codebook", 0.25, 2.0)


def test_moving_averages_only_where_asked(tmp_path: Path):
    model = small_model()
    averages = {
        "model_ema." + name.replace(".", ""): value + 1 for name, value in model.named_parameters()
    } | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.zeros((), dtype=torch.int)}
    checkpoint, config = write_published(
        tmp_path, model.state_dict() | averages, published_yaml(model, target=LDM)
    )
    plain = import_taming_transformers(checkpoint, config=config)
    assert len(plain.left_out[next(iter(plain.left_out))]) == len(averages)
    weight = model.decoder.conv_in.weight
    assert torch.equal(plain.model.decoder.conv_in.weight, weight)
    averaged = import_taming_transformers(checkpoint, config=config, ema=True).model
    assert torch.equal(averaged.decoder.conv_in.weight, weight + 1)
    del averages["model_ema.decoderconv_inweight"]
    write_published(tmp_path, model.state_dict() | averages, published_yaml(model))
    with pytest.raises(ArtifactError, match=r"1 parameters are not among them \(decoder.conv_in.weight\)"):
        import_taming_transformers(checkpoint, config=config, ema=True)
    write_published(tmp_path, model.state_dict(), published_yaml(model))
    with pytest.raises(ArtifactError, match="no moving averages"):
        import_taming_transformers(checkpoint, config=config, ema=True)


@pytest.mark.parametrize("kind", ["nearest", "gumbel", "ema"])
def test_a_remap_gives_the_kept_codes_in_their_order(tmp_path: Path, kind: str, images: torch.Tensor):
    model = small_model(quantizer={"kind": kind, "codebook_size": 24, "code_dim": 4})
    kept = torch.tensor([7, 3, 20, 11])
    state = model.state_dict() | {"quantize.used": kept}
    target = {"gumbel": "GumbelVQ", "ema": "EMAVQ"}.get(kind, "VQModel")
    description = published_yaml(model, f"taming.models.vqgan.{target}", remap="used.npy")
    checkpoint, config = write_published(tmp_path, state, description)
    result = import_taming_transformers(checkpoint, config=config)
    assert torch.equal(result.model.codebook, model.codebook[kept])
    assert "keeps 4 of 24 codes" in result.notes[-1]
    codes = result.model.encode(images)
    assert_close(result.model.decode(codes), model.decode(kept[codes]), rtol=1e-5, atol=1e-5)
    state["quantize.used"] = torch.tensor([3, 24])
    write_published(tmp_path, state, description)
    with pytest.raises(ArtifactError, match="does not list codes of 0 to 23"):
        import_taming_transformers(checkpoint, config=config)


@pytest.mark.parametrize("kind", ["nearest", "gumbel", "ema"])
def test_without_a_config_the_model_follows_from_shapes(tmp_path: Path, kind: str, images: torch.Tensor):
    quantizer = {"kind": kind, "codebook_size": 24, "code_dim": 4}
    model = small_model(quantizer=quantizer, attention_resolutions=[8, 4])
    checkpoint, _ = write_published(tmp_path, model.state_dict(), {})
    found = import_taming_transformers(checkpoint).model
    assert found.config.quantizer.kind == kind
    assert torch.equal(found.encode(images), model.encode(images))
    assert_close(found.decode(found.encode(images)), model.decode(model.encode(images)))


def test_without_a_config_labels_are_known_by_their_colours_and_depth_is_not(tmp_path: Path):
    model = small_model(input="segmentation", in_channels=7)
    checkpoint, _ = write_published(tmp_path, model.state_dict() | {"colorize": torch.zeros(3, 7, 1, 1)}, {})
    assert import_taming_transformers(checkpoint).model.config.input == "segmentation"
    write_published(tmp_path, small_model(in_channels=1).state_dict(), {})
    with pytest.raises(ArtifactError, match=r"1 channel\(s\).* as --config"):
        import_taming_transformers(checkpoint)
    write_published(tmp_path, {"transformer.tok_emb.weight": torch.zeros(2, 2)}, {})
    with pytest.raises(ArtifactError, match="no codebook under a known name"):
        import_taming_transformers(checkpoint)


F4 = {"z_channels": 3, "ch_mult": [1, 2, 4], "attn_resolutions": []}
F8 = {"z_channels": 4, "ch_mult": [1, 2, 2, 4], "attn_resolutions": [32]}
TEMPERATURE = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "verbosity_interval": 0,
        "warm_up_steps": 5000,
        "max_decay_steps": 1000001,
        "lr_start": 0.9,
        "lr_max": 0.9,
        "lr_min": 1e-6,
    },
}
# Specs: the published autoencoders; each must build (on the meta device: no memory, no time).
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "f16-16384": ("taming.models.vqgan.VQModel", {"n_embed": 16384, "embed_dim": 256}, {}),
    "depth-f16": (
        "taming.models.vqgan.VQNoDiscModel",
        {"image_key": "depth"},
        {"in_channels": 1, "out_ch": 1},
    ),
    "coco-183": (
        "taming.models.vqgan.VQSegmentationModel",
        {"n_labels": 183, "image_key": "segmentation"},
        {"in_channels": 183, "out_ch": 183},
    ),
    "gumbel-f8": (
        "taming.models.vqgan.GumbelVQ",
        {"n_embed": 8192, "kl_weight": 1e-8, "temperature_scheduler_config": TEMPERATURE},
        {"ch_mult": [1, 1, 2, 4], "attn_resolutions": [32]},
    ),
    "f4": (LDM, {"n_embed": 8192, "embed_dim": 3}, F4),
    "f4-noattn": (
        "ldm.models.autoencoder.VQModelInterface",
        {"n_embed": 8192, "embed_dim": 3},
        F4 | {"attn_type": "none"},
    ),
    "f8": (LDM, {"n_embed": 16384, "embed_dim": 4}, F8),
    "f8-n256": (LDM, {"n_embed": 256, "embed_dim": 4}, F8),
    "f16-ldm": (
        LDM,
        {"n_embed": 16384, "embed_dim": 8, "batch_resize_range": [256, 384]},
        {"z_channels": 8},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_build(tmp_path: Path, name: str):
    from stage1_vq.interop.published_config import read_published

    target, params, net = PUBLISHED[name]
    ddconfig = {
        "double_z": False, "z_channels": 256, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0, **net,
    }  # fmt: skip
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": {}}
    values = {"n_embed": 1024, "embed_dim": 256, "ddconfig": ddconfig, "lossconfig": loss, **params}
    path = tmp_path / "model.yaml"
    path.write_text(
        yaml.safe_dump({"model": {"target": target, "params": values}, "data": {"target": "os.system"}})
    )
    config = read_published(path, None).model
    with torch.device("meta"):
        names = VQModel(config).state_dict()
    assert config.downsample_factor == 2 ** (len(ddconfig["ch_mult"]) - 1)
    assert ("encoder.mid.attn_1.q.weight" in names) == (name != "f4-noattn")
    assert any(".attn.0." in key for key in names) == bool(ddconfig["attn_resolutions"])
    if name == "gumbel-f8":
        assert config.quantizer.temperature(0, 1) == 0.9
        assert config.quantizer.temperature(1000001, 1) == pytest.approx(1e-6)


def test_what_scripts_leave_beside_the_weights_is_neither_run_nor_needed(tmp_path: Path):
    model = small_model()
    beside = {
        "args": argparse.Namespace(path=tmp_path),
        "best": np.float64(0.5),
        "callbacks": {"ModelCheckpoint": {"best_model_path": tmp_path / "best.ckpt"}},
    }
    checkpoint, config = write_published(tmp_path, model.state_dict(), published_yaml(model), **beside)
    assert import_taming_transformers(checkpoint, config=config).model.content_hash() == model.content_hash()


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def break_payload(checkpoint: Path, config: Path, canary: Path) -> str:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": state, "callbacks": _Payload(canary)}, checkpoint)
    return "names posix.system"


def break_old_payload(checkpoint: Path, config: Path, canary: Path) -> str:
    torch.save({"x": _Payload(canary)}, checkpoint, _use_new_zipfile_serialization=False)
    return "names posix.system"


def break_bare_payload(checkpoint: Path, config: Path, canary: Path) -> str:
    checkpoint.write_bytes(pickle.dumps({"state_dict": _Payload(canary)}, protocol=2))
    return "not loaded|names posix.system|cut off or damaged"


def break_unknown_class(checkpoint: Path, config: Path, canary: Path) -> str:
    torch.save({"state_dict": {"a": fractions.Fraction(1, 3)}}, checkpoint)
    return "names fractions.Fraction"


def break_half(checkpoint: Path, config: Path, canary: Path) -> str:
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    return "cut off or damaged"


def break_text(checkpoint: Path, config: Path, canary: Path) -> str:
    checkpoint.write_text("<html>Not found</html>")
    return "cut off or damaged|not loaded"


def _change(checkpoint: Path, **changes: torch.Tensor | None) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for key, value in changes.items():
        name = key.replace("__", ".")
        content["state_dict"].pop(name)
        if value is not None:
            content["state_dict"][name] = value
    torch.save(content, checkpoint)


def break_missing_key(checkpoint: Path, config: Path, canary: Path) -> str:
    _change(checkpoint, decoder__conv_in__bias=None)
    return r"1 keys are missing \(decoder.conv_in.bias\)"


def break_extra_key(checkpoint: Path, config: Path, canary: Path) -> str:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["encoder.extra"] = torch.zeros(1)
    torch.save(content, checkpoint)
    return r"1 keys are not expected \(encoder.extra\)"


def break_shape(checkpoint: Path, config: Path, canary: Path) -> str:
    _change(checkpoint, quant_conv__weight=torch.zeros(4, 9, 1, 1))
    return r"quant_conv.weight is \(4, 9, 1, 1\) there and \(4, 8, 1, 1\) by the config"


def break_codebook(checkpoint: Path, config: Path, canary: Path) -> str:
    _edit(config, "n_embed", 25)
    return r"quantize.embedding.weight is \(24, 4\) there and \(25, 4\) by the config"


def break_target(checkpoint: Path, config: Path, canary: Path) -> str:
    values = yaml.safe_load(config.read_text())
    values["model"]["target"] = "os.system"
    config.write_text(yaml.safe_dump(values))
    return "target 'os.system' is not an autoencoder"


def break_yaml_tag(checkpoint: Path, config: Path, canary: Path) -> str:
    config.write_text(f"model: !!python/object/apply:os.system ['touch {canary}']")
    return "not plain YAML"


def break_yaml_shape(checkpoint: Path, config: Path, canary: Path) -> str:
    config.write_bytes(checkpoint.read_bytes())
    return "model.yaml (cannot be read|is not plain YAML)"


def break_no_checkpoint(checkpoint: Path, config: Path, canary: Path) -> str:
    checkpoint.unlink()
    return "model.ckpt does not exist"


def break_no_config(checkpoint: Path, config: Path, canary: Path) -> str:
    config.unlink()
    return "model.yaml does not exist"


def break_option(checkpoint: Path, config: Path, canary: Path) -> str:
    _edit(config, "l2_norm", True)
    return "key 'l2_norm' is not one that can be imported"


def _edit(config: Path, key: str, value: Any) -> None:
    values = yaml.safe_load(config.read_text())
    values["model"]["params"][key] = value
    config.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    "damage",
    [value for name, value in sorted(globals().items()) if name.startswith("break_")],
    ids=lambda damage: damage.__name__.removeprefix("break_"),
)
def test_what_cannot_be_trusted_is_refused_by_name(tmp_path: Path, damage: Any):
    model = small_model()
    checkpoint, config = write_published(tmp_path, model.state_dict(), published_yaml(model))
    canary = tmp_path / "canary"
    message = damage(checkpoint, config, canary)
    with pytest.raises(UserError, match=message) as refused:
        import_taming_transformers(checkpoint, config=config)
    assert "\n" not in str(refused.value)
    out = tmp_path / "out"
    done = taming("vq", "import", "taming-transformers", checkpoint, "--config", config, "--out", out)
    assert done.returncode == 2
    assert done.stderr == f"error: {refused.value}\n"
    assert not out.exists()
    assert not canary.exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("double_z", True, "ddconfig.double_z is True; only False can be imported"),
        ("tanh_out", True, "ddconfig.tanh_out is True"),
        ("attn_type", "linear", "ddconfig.attn_type is 'linear'"),
        ("out_ch", 6, "out_ch is 6 and in_channels 3"),
        ("ch_mult", 4, "not of the published form"),
        ("resolution", "large", "not of the published form"),
        ("ch", 48, "norm_num_groups 32 does not divide"),
        ("surprise", 1, "key 'surprise' is not one that can be imported"),
    ],
)
def test_networks_that_ours_is_not_are_refused(tmp_path: Path, key: str, value: Any, message: str):
    model = small_model()
    description = published_yaml(model)
    description["model"]["params"]["ddconfig"][key] = value
    checkpoint, config = write_published(tmp_path, model.state_dict(), description)
    with pytest.raises(ConfigError, match=message):
        import_taming_transformers(checkpoint, config=config)


@pytest.mark.parametrize(
    "change",
    [
        {"n_embed": "many"},
        {"kl_weight": "small"},
        {"lossconfig": {"params": {"codebook_weight": []}}},
        {"lossconfig": {"params": 3}},
        {"ddconfig": 3},
    ],
    ids=str,
)
def test_values_of_another_form_are_refused_in_one_line(tmp_path: Path, change: dict[str, Any]):
    model = small_model()
    checkpoint, config = write_published(tmp_path, model.state_dict(), published_yaml(model, **change))
    with pytest.raises(ConfigError) as refused:
        import_taming_transformers(checkpoint, config=config)
    assert "\n" not in str(refused.value)


def test_parts_of_a_larger_checkpoint(tmp_path: Path):
    first, condition = small_model(), small_model(input="segmentation", in_channels=5)
    state = {f"first_stage_model.{key}": value for key, value in first.state_dict().items()}
    state |= {f"cond_stage_model.{key}": value for key, value in condition.state_dict().items()}
    state["transformer.tok_emb.weight"] = torch.zeros(3, 3)
    target = "taming.models.vqgan.VQSegmentationModel"
    params = {
        "first_stage_config": published_yaml(first)["model"],
        "cond_stage_config": published_yaml(condition, target=target, n_labels=5)["model"],
    }
    description = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": params}}
    checkpoint, config = write_published(tmp_path, state, description)
    for name, part, model in (
        ("first", "first_stage_model", first),
        ("second", "cond_stage_model", condition),
    ):
        out = tmp_path / name
        done = taming(
            "vq",
            "import",
            "taming-transformers",
            checkpoint,
            "--config",
            config,
            "--part",
            part,
            "--out",
            out,
        )
        assert done.returncode == 0, done.stderr
        assert VQModel.from_pretrained(out).content_hash() == model.content_hash()
    for given in (config, None):
        with pytest.raises(UserError, match="several parts; say which one with --part first_stage_model"):
            import_taming_transformers(checkpoint, config=given)
    params["cond_stage_config"] = "__is_first_stage__"
    same = {f"cond_stage_model.{key}": value for key, value in first.state_dict().items()}
    kept = {key: value for key, value in state.items() if not key.startswith("cond_stage_model.")}
    write_published(tmp_path, kept | same, description)
    found = import_taming_transformers(checkpoint, config=config, part="cond_stage_model").model
    assert found.content_hash() == first.content_hash()
    params["cond_stage_config"] = "__is_unconditional__"
    write_published(tmp_path, state, description)
    with pytest.raises(ConfigError, match="cond_stage_config is '__is_unconditional__'"):
        import_taming_transformers(checkpoint, config=config, part="cond_stage_model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gigagan", "x"), "no importer for 'gigagan'"),
        (("llamagen", "x", "--config", "y"), "--config is not for llamagen"),
        (("diffusers", "x", "--ema"), "--ema is not for diffusers"),
        (("taming-transformers", "x", "--part", "both"), "no part 'both'"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, arguments: tuple[str, ...], message: str):
    done = taming("vq", "import", *arguments, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
