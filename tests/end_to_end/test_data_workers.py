"""Data workers of real runs at the command line: their death, Ctrl-C, and the death of the run itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY_TRAINING, vq_values

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def start(tmp_path: Path, workers: int) -> tuple[subprocess.Popen[str], Path]:
    training = {**TINY_TRAINING, "steps": 100000, "evaluate_every": 100000, "preview_every": 100000,
                "checkpoint_every": 100000, "workers": workers, "output": str(tmp_path / "run")}  # fmt: skip
    values = vq_values(training=training)
    values["data"] = {**values["data"], "num_train": 5000, "cache": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "taming", "vq", "train", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "run/log.jsonl"

    def trains() -> bool:
        return process.poll() is not None or (log.is_file() and len(log.read_text().splitlines()) > 3)

    assert until(trains, 60)
    assert process.poll() is None, process.communicate()[0]
    return process, log


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pids: list[int]) -> bool:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return "X"

    return all(state(pid) in "ZX" for pid in pids)


def test_a_dead_worker_is_one_line_and_exit_code_75(tmp_path: Path) -> None:
    process, _ = start(tmp_path, 2)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 75, out
    last = out.strip().splitlines()[-1]
    # torch tells what killed it, or only that it is gone, whichever it notices first.
    assert f"a data worker (pid {workers[0]}) of process 0 " in last, out
    assert "want of memory" in last
    assert "Traceback" not in out
    assert gone(workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_saves_and_leaves_without_tracebacks(
    tmp_path: Path, number: signal.Signals
) -> None:
    process, log = start(tmp_path, 2)
    workers = children(process.pid)
    os.killpg(process.pid, number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, out
    assert "Traceback" not in out
    assert "data worker" not in out
    assert gone(workers)
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    step = json.loads(log.read_text().splitlines()[-1])["step"]
    assert int(saved[-1].name.removeprefix("step-")) >= step


def test_no_worker_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    process, _ = start(tmp_path, 3)
    workers = children(process.pid)
    assert len(workers) == 3
    process.kill()
    process.wait()
    assert until(lambda: gone(workers), 5)
