"""kill -9 at any moment, and the run that goes on ends as if it had never stopped (see killing.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def hunt(out: Path, *options: object, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.end_to_end.killing", "--out", out, *options]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def test_killed_runs_of_both_stages_end_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    report = hunt(tmp_path, "--kills", 4, "--only", "1p-2w-2a", "--only", "stage2-2p-0w", seconds=120)
    assert len(report["kills"]) == 4
    assert report["equal"] == 2


@pytest.mark.slow
def test_thirty_kills_and_every_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    report = hunt(tmp_path, "--kills", 36, "--seed", 5, seconds=900)
    kills = report["kills"]
    assert len(kills) == 36
    assert not report["failures"]
    assert report["equal"] >= 9
    # Of every kind some: or the seed must be another.
    assert sum(kill["in_a_save"] for kill in kills) >= 8
    assert sum(kill["manner"] == "moment" for kill in kills) >= 8
    assert sum(kill["whom"] != "all" for kill in kills) >= 3
    assert max(kill["alive"] for kill in kills) < 30
