"""kill -9 at any moment, and the run that goes on ends as if it had never stopped (see killing.py)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import TINY_TRAINING, vq_values
from tests.end_to_end.killing import PATIENCE, SCENARIOS, differences, hunt_for_some, what_is_left
from tests.ranks import run_ranks

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


def test_killed_runs_of_both_stages_and_of_a_gan_end_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    names = ("stage1-1p-2w-2a", "stage2-2p-0w-1a", "gan-sagan-1p-0w-1a")
    # With this seed all die in a save of the one, and the process that saves of the other.
    outcome = run_ranks(hunt_for_some, 1, names, 3, 35, tmp_path / "runs", timeout=120)[0]
    assert outcome.error is None
    assert outcome.result is not None
    assert not outcome.result["failures"]
    assert [kill["whom"] for kill in outcome.result["kills"]] == ["all", "0", "all"]
    assert any(kill["in_a_save"] for kill in outcome.result["kills"])
    assert outcome.result["equal"] == 3


@pytest.mark.slow
def test_many_kills_and_every_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    report = hunt(tmp_path, "--kills", 64, "--seed", 5, seconds=1200)
    kills = report["kills"]
    assert len(kills) == 64
    assert not report["failures"]
    assert report["equal"] >= len(SCENARIOS)
    # Of every kind some: or the seed must be another.
    assert sum(kill["in_a_save"] for kill in kills) >= 8
    assert sum(kill["manner"] == "moment" for kill in kills) >= 8
    assert sum(kill["whom"] != "all" for kill in kills) >= 3
    assert max(kill["alive"] for kill in kills) < PATIENCE


@pytest.mark.slow
def test_a_launcher_whose_process_is_killed_ends_and_goes_on(tmp_path: Path) -> None:
    """torchrun on the command line: one process dies, in the midst of a step or of a save."""
    config, random_ = tmp_path / "vq.yaml", random.Random(0)
    config.write_text(yaml.safe_dump(vq_values(training={**TINY_TRAINING, "steps": 60, "preview_every": 60})))

    def launch(run: Path) -> subprocess.Popen[str]:
        launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
        command = (*launcher, "-m", "taming", "vq", "train", config, "-o", f"training.output={run}")
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    whole = launch(tmp_path / "whole")
    said = whole.communicate(timeout=240)[1]
    assert whole.returncode == 0, said
    run = tmp_path / "killed"
    for step in (10, 30, 50):
        process = launch(run)
        while not (run / "checkpoints" / f"step-{step:08d}").is_dir():
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        time.sleep(random_.uniform(0, 0.1))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(random_.choice(children)), signal.SIGKILL)
        start = time.monotonic()
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert time.monotonic() - start < PATIENCE
    last = launch(run)
    said = last.communicate(timeout=240)[1]
    assert last.returncode == 0, said
    assert "resumed from" in said
    assert not differences(what_is_left(tmp_path / "whole"), what_is_left(run))
