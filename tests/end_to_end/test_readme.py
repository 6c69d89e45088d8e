"""The README's commands and its Python, run as they stand, on models small enough for a test."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.test_command_line import taming

README = Path(__file__).parents[2] / "README.md"
# What makes a shipped config small; nothing else of the commands is changed.
SMALLER = {
    "vq": ["model.channels=8", "model.norm_num_groups=4", "model.z_channels=8", "discriminator=null"],
    "gan": ["generator.channels=8", "discriminator.channels=8"],
    "ar": ["transformer.num_layers=1", "transformer.width=16", "transformer.num_heads=2"],
}
SHORT = ["training.steps=2", "training.batch_size=2", "training.evaluation_pictures=2"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 13 photographs, in which the README's commands have run."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "photos").mkdir()
    for number in range(12):
        colour = (20 * number, 255 - 20 * number, 128)
        Image.new("RGB", (90 + number, 70), colour).save(folder / f"photos/{number}.jpg")
    Image.new("RGB", (96, 80), (40, 90, 160)).save(folder / "photos/lake.jpg")
    commands = [line for block in blocks("bash") for line in block.strip().splitlines()]
    assert len(commands) >= 10
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "taming", command
        if words[2] == "train":
            for override in SMALLER[words[1]] + SHORT:
                words += ["-o", override]
            if words[1] == "gan" and "data.root=photos" in words:  # of 13 pictures, more than one
                words += ["-o", "data.validation_fraction=0.4"]
        if words[1:3] == ["data", "scenes"]:
            words[words.index("--num") + 1] = "12"
        done = taming(*words[1:], cwd=folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return folder


def test_commands_leave_what_the_readme_says(place: Path) -> None:
    assert len(list((place / "painted").glob("*.png"))) == 14  # and the sheet
    assert (place / "samples/0003.json").is_file()
    with Image.open(place / "wide/0000.png") as image:
        assert image.size == (128, 64)
    for folder in ("painted-maps", "from-edges", "completed"):
        assert (place / folder / "sheet.png").is_file()


def test_python_runs_as_it_stands(place: Path) -> None:
    (source,) = blocks("python")
    names: dict[str, object] = {}
    with contextlib.chdir(place):
        exec(compile(source, "README.md", "exec"), names)
    assert names["codes"].shape == (1, 16, 24)
    assert names["out"].images.shape == (2, 3, 64, 128)
    assert (place / "tokenizer/model.safetensors").is_file()


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).is_file(), target
