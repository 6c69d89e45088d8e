"""Configs: overrides, unions by kind, and errors that name the way out."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from taming.config import Config, build_config, load_config, save_config, shipped_configs
from taming.errors import ConfigError


class Wide(Config):
    kind: Literal["wide"] = "wide"
    width: int = Field(3, gt=0)


class Tall(Config):
    kind: Literal["tall"] = "tall"
    height: int = 3


class Document(Config):
    shape: Annotated[Wide | Tall, Field(discriminator="kind")] = Wide()
    extra: Tall | None = None
    name: str = "x"
    sizes: tuple[int, ...] = (1, 2)


class Shapes(Config):
    shapes: list[Annotated[Wide | Tall, Field(discriminator="kind")]]
    sizes: tuple[int, ...] = ()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_overrides_reach_into_sections_and_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "shape: {kind: tall, height: 2}\n")
    config = load_config(Document, path, ["shape.height=7", "sizes=[4, 5]", "extra.kind=tall", "name='8'"])
    assert config == Document(shape=Tall(height=7), extra=Tall(), sizes=(4, 5), name="8")


def test_overrides_reach_into_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "shapes: [{kind: wide}, {kind: tall, height: 2}]\nsizes: [1, 2]\n")
    config = load_config(Shapes, path, ["shapes.1.height=7", "sizes.0=5", "shapes.0={kind: tall}"])
    assert config == Shapes(shapes=[Tall(), Tall(height=7)], sizes=(5, 2))
    for override, message in (
        ("shapes.2.height=7", r"'2' is no entry of a list of 2; give 0 to 1"),
        ("shapes.first.height=7", "'first' is no entry of a list of 2"),
        ("sizes.0.x=7", r"sizes\.0 is a value"),
        ("shapes.1.heigth=7", r"unknown key shapes\.1\.heigth; did you mean height"),
        ("shapes.1.kind=round", r"shapes\.1\.kind: 'round' is not one of the kinds 'wide', 'tall'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(Shapes, path, [override])


def test_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = Document(shape=Tall(height=9))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(Document, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": {"kind": "wide", "widht": 3}}, r"unknown key shape\.widht; did you mean width\?"),
        ({"shapes": 1}, r"unknown key shapes; did you mean shape\?"),
        ({"shape": {"kind": "round"}}, r"shape\.kind: 'round' is not one of the kinds 'wide', 'tall'"),
        ({"shape": {"width": 3}}, r"shape\.kind: needs a kind, one of 'wide', 'tall'"),
        ({"shape": {"kind": "wide", "width": -1}}, r"shape\.width: .*greater than 0 \(given: -1\)"),
        ({"extra": {"heigth": 1}}, r"unknown key extra\.heigth; did you mean height\?"),
    ],
)
def test_errors_name_the_key_and_the_way_out(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(Document, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shape.width", "not of the form a.b=value"),
        ("name.first=1", "name is a value, not a section"),
        ("shape.widt=4", "did you mean width"),
    ],
)
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, "name: a\nshape: {kind: wide}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(Document, path, [override])


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "- 1", "a: [", "\x00"])
def test_only_plain_mappings_are_read(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(Document, write(tmp_path, text))


def test_unknown_name_lists_the_shipped_ones() -> None:
    name = next(iter(shipped_configs("stage1")))
    with pytest.raises(ConfigError, match=f"did you mean {name}"):
        load_config(Document, name + "x", group="stage1")


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Document().name = "y"  # type: ignore[misc]
