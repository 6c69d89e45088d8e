"""What a published YAML says about a transformer, its condition and its order.

Names under `target` are compared with a fixed table and never imported. Keys that might change what is
computed and are not known are refused. Facts: CompVis/taming-transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stage1_vq.interop.published_config import FAMILIES, Part, only_known, section_of
from taming.config import read_yaml
from taming.errors import ConfigError

CONTAINER = "taming.models.cond_transformer.Net2NetTransformer"
GPT = "taming.modules.transformer.mingpt.GPT"
LABELS = "taming.modules.util.Labelator"
START = "taming.modules.util.SOSProvider"
COORDINATES = "taming.modules.misc.coord.CoordStage"
OBJECTS = "taming.models.dummy_cond_stage.DummyCondStage"
PERMUTERS = "taming.modules.transformer.permuter."
PERMUTER_KINDS = (
    "Identity",
    "Subsample",
    "ZCurve",
    "SpiralOut",
    "SpiralIn",
    "Random",
    "AlternateParsing",
)

SHAPE_KEYS = ("vocab_size", "block_size", "n_layer", "n_embd")
DROPOUT_KEYS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
CONTAINER_KEYS = {
    *("transformer_config", "first_stage_config", "cond_stage_config", "permuter_config"),
    *("first_stage_key", "cond_stage_key", "downsample_cond_size", "sos_token", "unconditional", "pkeep"),
}
IDLE_KEYS = {"ckpt_path", "ignore_keys", "monitor", "learning_rate", "base_learning_rate"}
"""They steer training, not what a model computes."""


@dataclass(frozen=True)
class PublishedGPT:
    """What the weights of a transformer do not tell, and what they must agree with."""

    num_heads: int
    num_unmasked: int
    dropouts: tuple[float, float, float]
    """Of embeddings, attention and residuals."""
    shapes: dict[str, int]
    """Those of SHAPE_KEYS that the file has."""


@dataclass(frozen=True)
class StartToken:
    """No condition: the sequence begins with an entry of the table."""

    token: int


@dataclass(frozen=True)
class Labels:
    """One class label, an entry of the table."""

    num_classes: int


@dataclass(frozen=True)
class CoordinateTokens:
    """Tokens round(levels * c), c the place of a cell in its picture."""

    levels: int
    downsample_factor: int


@dataclass(frozen=True)
class CodesOf:
    """Codes of an autoencoder: a part of the checkpoint."""

    part: Part
    key: str
    """cond_stage_key: what it encodes."""
    resize: int | None
    """downsample_cond_size: height and width that the map is brought to first."""


@dataclass(frozen=True)
class ObjectTokens:
    """A layout of objects. The file's data section says how it was made; None where it does not."""

    place: Literal["box", "centre"]
    num_tokens: int | None
    max_objects: int | None
    crop: bool | None


PublishedCondition = StartToken | Labels | CoordinateTokens | CodesOf | ObjectTokens


@dataclass(frozen=True)
class PublishedTransformer:
    """A transformer with its condition and order; its autoencoders are read by stage1_vq.interop."""

    gpt: PublishedGPT
    condition: PublishedCondition
    permuter: str
    """One of PERMUTER_KINDS."""
    permuter_grid: tuple[int, int] | None


def read_published_transformer(path: Path) -> PublishedTransformer | PublishedGPT:
    """The transformer that `path` describes: one with its tokenizers, or a bare one.

    Raises ConfigError naming the key at fault.
    """
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist; give the YAML file that came with the checkpoint")
    values = read_yaml(path)
    section = section_of(values, "model", path)
    target, params = section.get("target"), section_of(section, "params", path)
    if target == GPT:
        return _gpt(params, path)
    if target != CONTAINER:
        hint = ""
        if target in FAMILIES:
            hint = "; a tokenizer alone is read by `taming vq import taming-transformers`"
        raise ConfigError(
            f"{path}: target {target!r} is not a transformer that can be imported; known are {CONTAINER} and "
            f"{GPT}{hint}"
        )
    only_known(params, CONTAINER_KEYS | IDLE_KEYS, {"transformer_config", "first_stage_config"}, path)
    if _number(params, "pkeep", 1.0, path) <= 0:
        raise ConfigError(
            f"{path}: pkeep is {params['pkeep']!r}: such a model writes all codes at once, from noise; only "
            "those with pkeep above 0 can be imported"
        )
    transformer = section_of(params, "transformer_config", path)
    if transformer.get("target") != GPT:
        raise ConfigError(
            f"{path}: transformer_config.target is {transformer.get('target')!r}; only {GPT} can be imported"
        )
    kind, grid = _permuter(params.get("permuter_config"), path)
    gpt = _gpt(section_of(transformer, "params", path), path)
    return PublishedTransformer(gpt, _condition(params, values.get("data"), path), kind, grid)


def _gpt(params: dict[str, Any], path: Path) -> PublishedGPT:
    only_known(params, {*SHAPE_KEYS, *DROPOUT_KEYS, "n_head", "n_unmasked"}, set(), path)
    if "n_head" not in params:
        raise ConfigError(
            f"{path}: key 'n_head' is missing, and the number of heads does not follow from the weights; "
            "add it to transformer_config.params"
        )
    embedding, attention, residual = (float(_number(params, name, 0.0, path)) for name in DROPOUT_KEYS)
    gpt = PublishedGPT(
        num_heads=_whole(params, "n_head", 0, path),
        num_unmasked=_whole(params, "n_unmasked", 0, path),
        dropouts=(embedding, attention, residual),
        shapes={name: _whole(params, name, 0, path) for name in SHAPE_KEYS if name in params},
    )
    if gpt.num_heads < 1 or gpt.num_unmasked < 0:
        raise ConfigError(
            f"{path}: n_head is {gpt.num_heads} and n_unmasked {gpt.num_unmasked}; they are at least 1 and 0"
        )
    return gpt


def _condition(params: dict[str, Any], data: Any, path: Path) -> PublishedCondition:
    stage = params.get("cond_stage_config")
    if params.get("unconditional") is True or stage == "__is_unconditional__":
        return StartToken(_whole(params, "sos_token", 0, path))
    key = str(params.get("cond_stage_key", "depth"))
    given = _whole(params, "downsample_cond_size", -1, path)
    resize = given if given > 0 else None
    if stage == "__is_first_stage__":
        return CodesOf("first_stage_model", key, resize)
    if not isinstance(stage, dict):
        raise ConfigError(f"{path}: cond_stage_config is {stage!r}; it says what the condition is made of")
    target, inner = stage.get("target"), stage.get("params") or {}
    if target in FAMILIES:
        return CodesOf("cond_stage_model", key, resize)
    if not isinstance(inner, dict):
        raise ConfigError(f"{path}: cond_stage_config.params is {inner!r}, not a mapping")
    if target not in (LABELS, START, COORDINATES, OBJECTS):
        raise ConfigError(
            f"{path}: cond_stage_config.target {target!r} cannot be imported; known are {LABELS}, {START}, "
            f"{COORDINATES}, {OBJECTS} and the autoencoders {', '.join(FAMILIES)}"
        )
    if resize is not None:
        raise ConfigError(
            f"{path}: downsample_cond_size is {resize}, but {target} has no map to be resized; remove it"
        )
    if target == LABELS:
        only_known(inner, {"n_classes", "quantize_interface"}, {"n_classes"}, path)
        return Labels(_whole(inner, "n_classes", 0, path))
    if target == START:
        only_known(inner, {"sos_token", "quantize_interface"}, {"sos_token"}, path)
        return StartToken(_whole(inner, "sos_token", 0, path))
    if target == OBJECTS:
        only_known(inner, {"conditional_key"}, set(), path)
        return _objects(str(inner.get("conditional_key", key)), data, path)
    only_known(inner, {"n_embed", "down_factor"}, {"n_embed", "down_factor"}, path)
    return CoordinateTokens(_whole(inner, "n_embed", 0, path), _whole(inner, "down_factor", 0, path))


def _objects(key: str, data: Any, path: Path) -> ObjectTokens:
    """What the data set of the training made of boxes: it, not the model, knows."""
    places: dict[str, Literal["box", "centre"]] = {"objects_bbox": "box", "objects_center_points": "centre"}
    if key not in places:
        raise ConfigError(f"{path}: conditional_key {key!r} is not known; known are {', '.join(places)}")
    for name in ("params", "train", "params"):
        data = data.get(name) if isinstance(data, dict) else None
    made = data if isinstance(data, dict) else {}
    crop = made.get("encode_crop")
    return ObjectTokens(
        places[key],
        _whole(made, "no_tokens", 0, path) or None,
        _whole(made, "max_objects_per_image", 0, path) or None,
        crop if isinstance(crop, bool) else None,
    )


def _permuter(value: Any, path: Path) -> tuple[str, tuple[int, int] | None]:
    """(kind, grid) of a permuter_config."""
    if value is None:
        return "Identity", None
    target = str(value.get("target") if isinstance(value, dict) else value)
    kind = target.removeprefix(PERMUTERS)
    if not target.startswith(PERMUTERS) or kind not in PERMUTER_KINDS:
        raise ConfigError(
            f"{path}: permuter_config.target {target!r} is not known; known are "
            f"{', '.join(PERMUTERS + name for name in PERMUTER_KINDS)}"
        )
    if kind == "Identity":
        return kind, None
    params = section_of(value, "params", path)
    only_known(params, {"H", "W"}, {"H", "W"}, path)
    return kind, (_whole(params, "H", 0, path), _whole(params, "W", 0, path))


def _number(values: Mapping[str, Any], key: str, default: float, path: Path) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{path}: {key} is {value!r}, not a number")
    return value


def _whole(values: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = _number(values, key, default, path)
    if value != int(value):
        raise ConfigError(f"{path}: {key} is {value!r}, not a whole number")
    return int(value)
