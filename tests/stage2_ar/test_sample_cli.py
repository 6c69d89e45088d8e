"""`taming ar sample` beyond plain sampling: edits, guidance, choice, animation, tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from stage1_vq import VQModel
from stage2_ar import ARPipeline
from stage2_ar.cli import app
from taming.data.picture import save_png
from taming.errors import UserError
from tests.conftest import make_pipeline


@pytest.fixture
def place(tokenizer: VQModel, tmp_path: Path) -> Path:
    """A folder with a model of classes, a picture of 8x8, its mask, and a mask of another size."""
    make_pipeline(tokenizer, {"kind": "class", "num_classes": 3}).save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    save_png(torch.rand(3, 8, 8, generator=generator) * 2 - 1, tmp_path / "picture.png")
    save_png(torch.rand(3, 9, 8, generator=generator) * 2 - 1, tmp_path / "odd.png")
    mask = -torch.ones(1, 8, 8)
    mask[:, 2:4, 3:6] = 1
    save_png(mask, tmp_path / "mask.png")
    save_png(mask[:, :6], tmp_path / "small_mask.png")
    return tmp_path


def sample(place: Path, *options: Any) -> list[dict[str, Any]]:
    """What is written beside each picture. Options that name a file of `place` are made its path."""
    line = [str(place / str(part)) if str(part).endswith(".png") else str(part) for part in options]
    arguments = ["sample", str(place / "model"), "--out", str(place / "out"), "--device", "cpu", *line]
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None:
        raise result.exception
    return [json.loads(path.read_text()) for path in sorted((place / "out").glob("*.json"))]


def painted(place: Path, number: int = 0) -> torch.Tensor:
    with Image.open(place / f"out/{number:04d}.png") as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
            image.height, image.width, 3
        )


def picture(place: Path) -> torch.Tensor:
    with Image.open(place / "picture.png") as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(8, 8, 3)


def test_inpainting_from_files(place: Path) -> None:
    facts = sample(
        place, "--class", 1, "--complete", "picture.png", "--mask", "mask.png", "--keep-pixels", "--num", 2,
        "--best-of", 2, "--animation", "gif",
    )  # fmt: skip
    assert facts[1]["edit"]["complete"].endswith("picture.png")
    assert facts[1]["edit"]["keep_pixels"] is True
    assert len(facts[1]["log_likelihoods"]) == 2
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 3:6] = True
    assert torch.equal(painted(place)[~mask], picture(place)[~mask])
    assert not torch.equal(painted(place)[mask], picture(place)[mask])
    with Image.open(place / "out/0001.gif") as animation:
        assert getattr(animation, "n_frames", 1) > 2


def test_completion_is_what_the_pipeline_does(place: Path) -> None:
    facts = sample(
        place, "--class", 0, "--complete", "picture.png", "--keep", "left", "--seed", 3, "--num", 1
    )
    assert (facts[0]["edit"]["keep"], facts[0]["seed"]) == ("left", 3)
    pipe = ARPipeline.from_pretrained(place / "model")
    image = picture(place).permute(2, 0, 1)[None] / 127.5 - 1
    expected = pipe.complete(image, "left", {"class": [0]}, seed=3).images[0]
    save_png(expected, place / "expected.png")
    assert (place / "expected.png").read_bytes() == (place / "out/0000.png").read_bytes()


def test_outpainting_in_tiles_with_scheduled_guidance(place: Path) -> None:
    facts = sample(
        place, "--class", 1, "--outpaint", "picture.png", "--size", "12x16", "--keep-pixels", "--num", 1,
        "--tile", 4, "--guidance", 3, "--guidance-schedule", "cosine", "--guidance-power", 2,
    )  # fmt: skip
    assert (facts[0]["height"], facts[0]["width"], facts[0]["tile"]) == (12, 16, 4)
    assert (facts[0]["guidance_schedule"], facts[0]["guidance_power"]) == ("cosine", 2)
    assert torch.equal(painted(place)[2:10, 4:12], picture(place))


def test_variations_and_interpolation(place: Path) -> None:
    facts = sample(place, "--class", 1, "--variations", "picture.png", "--from-row", 2, "--num", 1)
    assert facts[0]["edit"]["from_row"] == 2
    for path in (place / "out").iterdir():
        path.unlink()
    facts = sample(place, "--class", 0, "--class", 2, "--interpolate", 3, "--num", 2)
    assert [fact["toward_second"] for fact in facts] == [0, 0, 0.5, 0.5, 1, 1]
    assert facts[0]["conditions"] == {"class": [0, 2]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--complete", "picture.png", "--variations", "picture.png"),
            "are different edits",
        ),
        (("--complete", "picture.png", "--mask", "small_mask.png"), "is 6x8 pixels and"),
        (("--complete", "odd.png"), "9x8 pixels is not in whole cells of 2; give --size 8x8"),
        (("--complete", "picture.png", "--keep", "top"), "choose upper, lower, left, right"),
        (("--complete", "picture.png", "--keep", "left", "--mask", "mask.png"), "exclude each other"),
        (("--mask", "mask.png"), "--mask belongs to --complete"),
        (("--variations", "picture.png", "--strength", 1.5), "strength 1.5 is not in"),
        (("--variations", "picture.png", "--keep-pixels"), "belong to --complete and --outpaint"),
        (("--complete", "picture.png", "--soft-border", 2), "give --keep-pixels as well"),
        (("--outpaint", "picture.png"), "give --size HxW"),
        (("--outpaint", "picture.png", "--size", "8x13"), "width 13 is not divisible"),
        (("--interpolate", 3), "but 1 are given"),
        (("--animation", "mp4"), "choose gif or webp"),
        (("--guidance-schedule", "cubic"), "choose constant, linear, cosine"),
        (("--best-of", 2, "--greedy"), "nothing to choose from"),
        (("--size", 9), "height 9 is not a multiple"),
        (("--complete", "nowhere.png"), "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place: Path, options: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        sample(place, "--class", 1, *options)
    assert "\n" not in str(raised.value)
    assert not (place / "out").exists()
