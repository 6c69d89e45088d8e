"""Conditions made of a second tokenizer's codes: encoded right, trained, saved with it, refused without."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stage1_vq import VQModel, tiling
from stage1_vq.config import VQModelConfig
from stage1_vq.inputs import one_hot
from stage2_ar import ARPipeline
from stage2_ar.conditions.codes import CodesCondition
from stage2_ar.conditions.tokenizers import attach_tokenizers, facts_of
from stage2_ar.config import ARModelConfig
from stage2_ar.model import ARModel
from stage2_ar.task import ARTask, model_config
from stage2_ar.train import filled_in, train
from taming.config import build_config
from taming.data.edges import canny
from taming.errors import ArtifactError, ConfigError, UserError
from tests.conftest import TINY_MODEL, ar_config
from tests.stage1_vq.interop.published import spread_codes

INPUTS: dict[str, dict[str, Any]] = {
    "segmentation": {"in_channels": 7},
    "depth": {"in_channels": 1},
    "edges": {"in_channels": 1},
    "image": {"in_channels": 3},
}


def condition_tokenizer(kind: str, seed: int = 3, **changes: Any) -> VQModel:
    torch.manual_seed(seed)
    quantizer = {"kind": "nearest", "codebook_size": 24, "code_dim": 4}
    values = TINY_MODEL | {"input": kind, "quantizer": quantizer} | INPUTS[kind] | changes
    model = VQModel(build_config(VQModelConfig, values)).eval()
    spread_codes(model)
    return model


def make_model(tokenizer: VQModel, own: VQModel, grid: tuple[int, int] = (4, 4), **condition: Any) -> ARModel:
    torch.manual_seed(1)
    facts = facts_of(own).model_dump()
    config = {
        "transformer": {"kind": "llama", "num_layers": 2, "num_heads": 2, "width": 16},
        "condition": {"kind": "codes", "facts": facts, **condition},
        "vocabulary_size": tokenizer.spec.codebook_size,
        "grid": grid,
        "downsample_factor": tokenizer.spec.downsample_factor,
        "tokenizer_hash": tokenizer.codes_hash(),
    }
    model = ARModel(build_config(ARModelConfig, config)).eval()
    with torch.no_grad():  # far from uniform, so that a wrong code changes another
        model.transformer.head.weight.mul_(100)
    attach_tokenizers(model.condition, lambda name: own)
    return model


def example(kind: str, size: tuple[int, int], count: int = 2) -> tuple[str, torch.Tensor]:
    """(user's name, a value) for a tokenizer of `kind`."""
    generator = torch.Generator().manual_seed(0)
    match kind:
        case "segmentation":
            return "segmentation", torch.randint(7, (count, *size), generator=generator)
        case "depth":
            return "depth", torch.rand(count, 1, *size, generator=generator)
        case _:
            return "image", torch.rand(count, 3, *size, generator=generator) * 2 - 1


@pytest.mark.parametrize("kind", INPUTS)
def test_codes_are_the_tokenizers_own(tokenizer: VQModel, kind: str) -> None:
    own = condition_tokenizer(kind)
    condition = make_model(tokenizer, own, placement="prefix").condition
    assert isinstance(condition, CodesCondition)
    name, value = example(kind, (8, 12))
    inputs = {"segmentation": lambda: one_hot(value, 7), "depth": lambda: value * 2 - 1}
    inputs["edges"] = lambda: canny(value)
    codes = own.encode(inputs.get(kind, lambda: value)())
    assert codes.unique().numel() > 3
    prefix = condition(condition.read({name: value}), (4, 6))
    assert condition.embedding is not None
    assert torch.equal(prefix.embeddings, condition.embedding(codes.flatten(1)))
    assert prefix.segments == ((4, 6),)
    # Each sample by itself, and under autocast: what is trained is what is sampled.
    alone = condition(condition.read({name: value[1:]}), (4, 6))
    assert torch.equal(alone.embeddings, prefix.embeddings[1:])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(condition(condition.read({name: value}), (4, 6)).embeddings, prefix.embeddings)
    window = condition.windows(condition.read({name: value}), (4, 6), (3, 3))(1, 2)
    assert torch.equal(window.embeddings, condition.embedding(codes[:, 1:4, 2:5].flatten(1)))


def test_large_maps_are_encoded_in_tiles(tokenizer: VQModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above a size, and then with the same codes; only the size is smaller here."""
    own = condition_tokenizer("segmentation")
    condition = make_model(tokenizer, own, placement="prefix").condition
    maps = example("segmentation", (24, 16), 3)[1]
    whole = condition(condition.read({"segmentation": maps}), (12, 8))
    asked: list[tuple[int, ...]] = []
    tiled = tiling.encode_tiled

    def spy(model: VQModel, images: torch.Tensor, *, tile: int) -> torch.Tensor:
        asked.append(tuple(images.shape))
        return tiled(model, images, tile=8)

    monkeypatch.setattr(tiling, "TILED_ABOVE", 16 * 16)
    monkeypatch.setattr(tiling, "encode_tiled", spy)
    again = condition(condition.read({"segmentation": maps}), (12, 8))
    assert asked == [(1, 7, 24, 16)] * 3
    assert torch.equal(again.embeddings, whole.embeddings)


def test_a_lower_resolution_is_seen_enlarged(tokenizer: VQModel) -> None:
    own = condition_tokenizer("image")
    condition = make_model(tokenizer, own, placement="prefix", scale=2).condition
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    small = torch.nn.functional.avg_pool2d(image, 2)
    derived = condition({"image": image}, (4, 4))
    assert torch.equal(derived.embeddings, condition(condition.read({"image": small}), (4, 4)).embeddings)
    seen = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear")
    assert isinstance(condition, CodesCondition)
    assert condition.embedding is not None
    assert torch.equal(derived.embeddings, condition.embedding(own.encode(seen).flatten(1)))
    with pytest.raises(UserError, match=r"needs \(B, 3, 4, 4\)"):
        condition(condition.read({"image": image}), (4, 4))


@pytest.mark.parametrize("placement", ["aligned", "prefix"])
def test_a_pipeline_brings_its_tokenizers(tokenizer: VQModel, tmp_path: Path, placement: str) -> None:
    own = condition_tokenizer("segmentation")
    model = make_model(tokenizer, own, placement=placement)
    assert not any("tokenizer" in key or "encoder" in key for key in model.state_dict())
    pipe = ARPipeline(model, tokenizer)
    pipe.save_pretrained(tmp_path)
    assert VQModel.from_pretrained(tmp_path, subfolder="condition_tokenizer").codes_hash() == own.codes_hash()
    loaded = ARPipeline.from_pretrained(tmp_path)
    maps = example("segmentation", (12, 16))[1]
    options: dict[str, Any] = {"height": 12, "width": 16, "num_images": 2, "guidance_scale": 1.5}
    out = pipe({"segmentation": maps}, **options)
    assert torch.equal(loaded({"segmentation": maps}, **options).codes, out.codes)
    assert torch.equal(loaded({"segmentation": maps}, **options, schedule="wavefront").codes, out.codes)
    other = loaded({"segmentation": (maps + 1) % 7}, **options)
    assert not torch.equal(other.codes, out.codes)
    condition_tokenizer("segmentation", seed=4).save_pretrained(tmp_path / "condition_tokenizer")
    with pytest.raises(ArtifactError, match="its codes mean something else"):
        ARPipeline.from_pretrained(tmp_path)


def test_a_pipeline_without_its_condition_tokenizer_is_refused(tokenizer: VQModel) -> None:
    own = condition_tokenizer("depth")
    values = make_model(tokenizer, own).config
    with pytest.raises(ArtifactError, match="tokenizer of the condition 'depth' is missing"):
        ARPipeline(ARModel(values), tokenizer)


def test_several_tokenizers(tokenizer: VQModel, tmp_path: Path) -> None:
    """Beside each other and coordinates, trained, saved under the names that a user gives."""
    tokenizer.save_pretrained(tmp_path / "pictures")
    parts: list[dict[str, Any]] = [{"kind": "coordinates"}]
    for kind in ("segmentation", "depth"):
        condition_tokenizer(kind).save_pretrained(tmp_path / kind)
        placement = "prefix" if kind == "depth" else "aligned"
        parts.append({"kind": "codes", "tokenizer": str(tmp_path / kind), "placement": placement})
    condition = {"kind": "combined", "conditions": parts}
    train(ar_config(tokenizer=str(tmp_path / "pictures"), condition=condition), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run" / "model").iterdir()}
    assert names >= {"condition_tokenizer_segmentation", "condition_tokenizer_depth"}
    pipe = ARPipeline.from_pretrained(tmp_path / "run")
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "transformer" / "config.json").read_text()
    given = dict(example(kind, (20, 16), 2) for kind in ("segmentation", "depth"))
    out = pipe(given, height=20, width=16, guidance_scale=2.0)
    assert out.images.shape == (2, 3, 20, 16)
    assert torch.equal(pipe(given, height=20, width=16, guidance_scale=2.0, batch_size=1).codes, out.codes)


def test_copies_share_the_tokenizer(tokenizer: VQModel) -> None:
    model = make_model(tokenizer, condition_tokenizer("depth"))
    again = copy.deepcopy(model)
    assert isinstance(model.condition, CodesCondition)
    assert isinstance(again.condition, CodesCondition)
    assert again.condition.tokenizer is model.condition.tokenizer


@pytest.mark.parametrize(
    ("kind", "condition", "message"),
    [
        ("image", {"channel_multipliers": [1, 1, 1]}, "cell of 4 pixels and the picture's one of 2"),
        ("depth", {"scale": 2}, "condition.scale makes second pictures of pictures"),
        ("depth", {"resize": 8}, "set placement: prefix"),
        ("depth", {"shared_vocabulary": True}, "set placement: prefix"),
        ("depth", {"shared_vocabulary": True, "placement": "prefix"}, "24 codes .* which has 16 entries"),
    ],
)
def test_what_cannot_be(tokenizer: VQModel, kind: str, condition: dict[str, Any], message: str) -> None:
    changes = {key: condition.pop(key) for key in list(condition) if key == "channel_multipliers"}
    with pytest.raises(ConfigError, match=message):
        make_model(tokenizer, condition_tokenizer(kind, **changes), **condition)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("segmentation", {"placement": "aligned"}),
        ("edges", {"placement": "prefix"}),
        ("image", {"placement": "aligned", "scale": 2}),
    ],
)
def test_it_trains(tokenizer: VQModel, tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    tokenizer.save_pretrained(tmp_path / "pictures")
    own = condition_tokenizer(kind)
    own.save_pretrained(tmp_path / "maps")
    condition = {"kind": "codes", "tokenizer": str(tmp_path / "maps"), **options}
    result = train(ar_config(tokenizer=str(tmp_path / "pictures"), condition=condition), tmp_path / "run")
    assert result.steps == 4
    pipe = ARPipeline.from_pretrained(tmp_path / "run")
    assert str(tmp_path) not in (tmp_path / "run" / "model" / "transformer" / "config.json").read_text()
    assert isinstance(pipe.model.condition, CodesCondition)
    assert pipe.model.condition.tokenizer.codes_hash() == own.codes_hash()
    size = (8, 8) if "scale" in options else (16, 16)
    name, value = example(kind, size, 1)
    assert pipe({name: value}, num_images=2).images.shape == (2, 3, 16, 16)


def test_training_needs_a_tokenizer(tokenizer: VQModel, tmp_path: Path) -> None:
    config = ar_config(tokenizer="x", condition={"kind": "codes"})
    with pytest.raises(ConfigError, match=r"set condition\.tokenizer to a saved one"):
        filled_in(config)
    condition_tokenizer("image").save_pretrained(tmp_path)
    config = filled_in(ar_config(tokenizer="x", condition={"kind": "codes", "tokenizer": str(tmp_path)}))
    assert model_config(config, tokenizer, (16, 16)).condition.model_dump()["tokenizer"] is None
    assert ARTask(config, tokenizer, (16, 16)).model.condition.prefix_length((8, 8)) == 1
