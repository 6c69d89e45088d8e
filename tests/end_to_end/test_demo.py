"""The demo, cut to a minute of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from stage2_ar.demo import run_demo
from taming.errors import UserError


@pytest.mark.slow
def test_a_minute_of_the_demo_follows_its_maps(tmp_path: Path) -> None:
    figures = run_demo(tmp_path / "demo", minutes=1.5, console=Console(stderr=True))
    written = json.loads((tmp_path / "demo/metrics.json").read_text())
    assert written["adherence"] == figures.adherence
    assert written.keys() >= {"psnr", "code_usage", "adherence", "adherence_shuffled", "seconds"}
    assert figures.adherence > figures.adherence_shuffled + 0.1
    assert figures.psnr > 15
    with Image.open(tmp_path / "demo/contact_sheet.png") as sheet:
        assert min(sheet.size) > 400


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        run_demo(tmp_path, minutes=1, console=Console(stderr=True))
    assert (tmp_path / "thesis.tex").read_text() == "x"
