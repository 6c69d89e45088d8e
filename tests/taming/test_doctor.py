"""The doctor finds what would fail, and says so by its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from taming import doctor


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(doctor.app, list(arguments), env={"COLUMNS": "200"})
    return result.exit_code, result.output


def test_a_healthy_machine_has_nothing_that_fails(tmp_path: Path) -> None:
    code, out = run("--out", str(tmp_path))
    assert code == 0, out
    assert "torch" in out
    assert "precision" in out
    assert "VGG16 weights" in out


def test_data_is_opened_as_training_would(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (70, 66)).save(tmp_path / f"{number}.png")
    code, out = run("--data", str(tmp_path), "--size", "64")
    assert code == 0
    assert "training and" in out
    code, out = run("--data", str(tmp_path), "--size", "128")
    assert code == 1
    assert "smaller than the crop 128x128" in out


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    code, out = run()
    assert code == 1
    assert "pip install no-such-package" in out


def test_a_folder_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    code, out = run("--out", str(tmp_path / "deep/runs"))
    assert code == 1
    assert "training.output" in out


@pytest.mark.parametrize(
    ("values", "state", "says"),
    [
        ("distributed_type: MULTI_GPU\nnum_processes: 4", "ok", "MULTI_GPU, 4 process"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "note", "set fsdp_version to 2"),
        ("distributed_type: DEEPSPEED", "note", "MULTI_GPU and FSDP only"),
        ("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 2", "note", "taming launch --cpu 2"),
        ("[not, a, config]", "note", "accelerate config"),
    ],
)
def test_what_accelerate_would_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str, state: str, says: str
) -> None:
    file = tmp_path / "default_config.yaml"
    file.write_text(values)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    finding = doctor._launcher()
    assert finding.state == state
    assert says in finding.says
