"""`taming gan sample`: files, what stands beside them, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from taming.errors import UserError
from taming.gan.sample_cli import sample as sample_command
from tests.taming.gan.test_model import lively


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gan") / "model"
    lively().save_pretrained(folder)
    return folder


def sample(saved: Path, out: Path, *options: Any) -> list[dict[str, Any]]:
    """What is written beside each picture."""
    app = typer.Typer()
    app.command()(sample_command)
    arguments = [str(saved), "--out", str(out), "--device", "cpu", *map(str, options)]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def test_every_class_has_a_row(saved: Path, tmp_path: Path) -> None:
    facts = sample(saved, tmp_path / "all", "--num", 2, "--seed", 7, "--truncation", 0.8)
    assert [(fact["class_name"], fact["noise"]) for fact in facts] == [
        (name, place) for name in ("ball", "house", "pine") for place in (0, 1)
    ]
    assert facts[3]["seed"] == 7
    assert facts[3]["truncation"] == 0.8
    assert facts[3]["height"] == facts[3]["width"] == 16
    with Image.open(tmp_path / "all" / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * 64
        assert sheet.size[1] > 3 * 64
    # A class's pictures do not depend on which others are asked for.
    sample(saved, tmp_path / "one", "--num", 2, "--seed", 7, "--truncation", 0.8, "--class", "house")
    assert (tmp_path / "one/0001.png").read_bytes() == (tmp_path / "all/0003.png").read_bytes()


def test_ways_between_pictures_and_classes(saved: Path, tmp_path: Path) -> None:
    facts = sample(saved, tmp_path / "ways", "--interpolate", 3, "--num", 2, "--class", "1")
    assert [fact["share"] for fact in facts] == [0, 0.5, 1, 0, 0.5, 1]
    assert facts[5]["from"]["noise"] == 1
    assert facts[5]["to"] == {"class": 1, "class_name": "house", "noise": 2}
    # The end of one way is the beginning of the next.
    assert (tmp_path / "ways/0002.png").read_bytes() == (tmp_path / "ways/0003.png").read_bytes()
    options = ("--interpolate", 2, "--between-classes", "--num", 1)
    facts = sample(saved, tmp_path / "classes", *options)
    names = [(fact["from"]["class_name"], fact["to"]["class_name"]) for fact in facts]
    assert names == [("ball", "house")] * 2 + [("house", "pine")] * 2


def test_mistakes_are_named_before_anything_is_written(saved: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--class", "pin"), "did you mean pine"),
        (("--truncation", "-1"), "truncation -1.0 is not above 0"),
        (("--between-classes",), "give that too"),
        (("--interpolate", 2, "--between-classes", "--class", 1), "give two or more --class"),
    ):
        with pytest.raises(UserError, match=message):
            sample(saved, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("here")
    with pytest.raises(UserError, match="not an empty folder"):
        sample(saved, tmp_path / "full")
