"""Configs: a YAML file and `a.b=value` overrides make one validated, frozen object.

A config is described by a `Config` subclass; alternatives are unions tagged by the key `kind`. Unknown
keys are refused with the nearest right name, so that a typing mistake never trains for a day unseen.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from taming.atomic import write_text
from taming.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")
LARGEST_CONFIG = 2**24


class Config(BaseModel):
    """Base of all configs: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def build_config(schema: type[ConfigT], values: Mapping[str, Any], *, source: str = "config") -> ConfigT:
    """Validate plain values. Raises ConfigError, one line that names the key and what is allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(schema, e) for e in error.errors())) from None


def load_config(
    schema: type[ConfigT], source: str | Path, overrides: Sequence[str] = (), *, group: str | None = None
) -> ConfigT:
    """Read a config file, or the shipped config of that name in `group`, and apply the overrides.

    `overrides` are "a.b=value" with the value in YAML ("model.quantizer.codebook_size=512").
    Raises ConfigError.
    """
    path = find_config(source, group)
    values = read_yaml(path)
    for override in overrides:
        set_value(values, *parse_override(override))
    return build_config(schema, values, source=str(source))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read with safe_load: tags that would build objects are refused."""
    try:
        values = yaml.safe_load(read_small_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply for a config") from None
    except (OSError, ValueError) as error:  # numbers and dates that are none raise ValueError
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping of keys to values")
    return values


def read_small_text(path: Path) -> str:
    """The text of a config. Raises OSError, or ValueError for a file too large to be one or no text."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"it has more than the {LARGEST_CONFIG} bytes that a config may have")
    return path.read_text(encoding="utf-8")


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config, defaults included, whole, as YAML that `load_config` reads back."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def differences(there: Mapping[str, Any], here: Mapping[str, Any], *, most: int = 8) -> str | None:
    """What differs between two flat configs, in words: the first `most` keys and how many more; else None."""
    changed = [
        f"{key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    rest = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + rest if changed else None


def shipped_configs(group: str) -> dict[str, Path]:
    """Name -> path of the configs that come with the toolkit in `group` ("stage1", "stage2", "demo")."""
    # In a wheel they are package data of taming.configs; in a checkout they lie beside the packages.
    roots = [Path(str(resources.files("taming"))) / "configs", Path(__file__).parents[1] / "configs"]
    for root in roots:
        if (root / group).is_dir():
            return {path.stem: path for path in sorted((root / group).glob("*.yaml"))}
    return {}


def find_config(source: str | Path, group: str | None) -> Path:
    """The file that `source` means: a path, or the name of a shipped config of `group`."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_configs(group) if group else {}
    if str(source) in shipped:
        return shipped[str(source)]
    near = difflib.get_close_matches(str(source), shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    names = f"shipped configs are {', '.join(shipped)}" if shipped else "give the path of a YAML file"
    raise ConfigError(f"no config {str(source)!r}: it is neither a file nor a shipped name; {hint}{names}")


def parse_override(override: str) -> tuple[str, Any]:
    """ "a.b=value" -> ("a.b", value), the value read as YAML. Raises ConfigError."""
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    try:
        return key.strip(), yaml.safe_load(text) if text.strip() else None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    """Set "a.b" in nested mappings, making sections as needed; "a.0" is the first entry of a list.

    Raises ConfigError.
    """
    *parents, last = key.split(".")
    node: Any = values
    for depth, parent in enumerate(parents):
        place = _place(node, parent, key)
        child = node.setdefault(place, {}) if isinstance(node, dict) else node[place]
        if child is None:
            child = node[place] = {}
        if not isinstance(child, dict | list):
            raise ConfigError(f"override {key}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[_place(node, last, key)] = value


def _place(node: Any, part: str, key: str) -> str | int:
    """One part of an override's key as an index into a mapping or a list."""
    if not isinstance(node, list):
        return part
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"override {key}: {part!r} is no entry of a list of {len(node)}; give 0 to {len(node) - 1}"
        )
    return int(part)


def _explain(schema: type[Config], error: Any) -> str:
    """One validation error in a user's words."""
    loc, kind = error["loc"], error["type"]
    name = ".".join(str(part) for part in _visible(schema, loc))
    if kind == "extra_forbidden":
        allowed = _keys_at(schema, loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"unknown key {name}{hint} (allowed: {', '.join(allowed)})"
    if kind == "missing":
        return f"key {name} is missing; set it in the file or with -o {name}=VALUE"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        expected = ", ".join(map(repr, _kinds_at(schema, loc)))
        given = error.get("ctx", {}).get("tag")
        given = f"{given!r} is not one of the kinds" if given is not None else "needs a kind, one of"
        return f"{name}.kind: {given} {expected}"
    given = error.get("input")
    shown = f" (given: {given!r})" if not isinstance(given, dict | list) else ""
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}{shown}" if name else message


def _visible(schema: type[Config], loc: Sequence[Any]) -> list[Any]:
    """`loc` without the tags that pydantic puts in for the members of a union."""
    visible: list[Any] = []
    node: Any = schema
    for part in loc:
        node, is_tag = _step(node, part)
        if not is_tag:
            visible.append(part)
    return visible


def _keys_at(schema: type[Config], loc: Sequence[Any]) -> list[str]:
    node: Any = schema
    for part in loc:
        node, _ = _step(node, part)
    node = _strip(node)
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _kinds_at(schema: type[Config], loc: Sequence[Any]) -> list[str]:
    node: Any = schema
    for part in loc:
        node, _ = _step(node, part)
    members = [_strip(member) for member in get_args(_strip(node))]
    tags = [member.model_fields["kind"] for member in members if hasattr(member, "model_fields")]
    return [str(kind) for tag in tags for kind in get_args(tag.annotation)]


def _step(node: Any, part: Any) -> tuple[Any, bool]:
    """Follow one part of an error's location; returns (annotation there, whether the part was a tag)."""
    node = _strip(node)
    if isinstance(node, type) and issubclass(node, BaseModel):
        found = node.model_fields.get(part)
        return (found.annotation if found else None), False
    origin = get_origin(node)
    if origin in (Union, types.UnionType):
        for member in get_args(node):
            member = _strip(member)
            if isinstance(member, type) and issubclass(member, BaseModel):
                tag = member.model_fields.get("kind")
                if (
                    tag is not None
                    and get_origin(tag.annotation) is Literal
                    and part in get_args(tag.annotation)
                ):
                    return member, True
        return None, False
    if origin in (list, tuple, dict, typing.Sequence):
        arguments = [a for a in get_args(node) if a is not Ellipsis]
        return (arguments[-1] if arguments else None), False
    return None, False


def _strip(node: Any) -> Any:
    """Drop Annotated[...] and `| None` around one annotation."""
    while get_origin(node) is Annotated:
        node = get_args(node)[0]
    if get_origin(node) in (Union, types.UnionType):
        members = [member for member in get_args(node) if member is not type(None)]
        if len(members) == 1:
            return _strip(members[0])
    return node
