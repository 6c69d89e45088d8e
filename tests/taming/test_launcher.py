"""Processes that are started together: they find each other, and how they end is what is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from taming import launcher
from taming.launcher import run_processes
from tests.conftest import TINY_TRAINING, vq_values


def run(source: str, processes: int = 2, environment: dict[str, str] | None = None) -> int:
    return run_processes(
        [sys.executable, "-c", f"import os, signal, sys, time\n{source}"], processes, environment or {}
    )


def test_each_process_knows_its_place(tmp_path: Path) -> None:
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_FSDP"
    source = f"open('{tmp_path}/' + os.environ['RANK'], 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert run(source, 3, {"ACCELERATE_USE_FSDP": "true"}) == 0
    told = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert told == [f"{rank} {rank} 3 3 127.0.0.1 true" for rank in range(3)]


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("sys.exit(2)", "time.sleep(60)", 2),  # a mistake: the others need not say it too
        ("os.kill(os.getpid(), 9)", "time.sleep(0.2); sys.exit(75)", 75),  # the other knows what happened
        ("os.kill(os.getpid(), 9)", "time.sleep(60)", 137),  # the other never notices
        ("sys.exit(1)", "pass", 1),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_knows(
    monkeypatch: pytest.MonkeyPatch, first: str, second: str, code: int
) -> None:
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    begin = time.monotonic()
    assert run(f"if os.environ['RANK'] == '0': {first}\nelse: {second}") == code
    assert time.monotonic() - begin < 10


def test_signals_are_passed_on_and_waited_for(tmp_path: Path) -> None:
    source = f"""
def stop(number, frame):
    time.sleep(0.2)  # it saves itself
    open('{tmp_path}/saved' + os.environ['RANK'], 'w').close()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
open('{tmp_path}/ready' + os.environ['RANK'], 'w').close()
time.sleep(60)
"""

    def tell() -> None:
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=tell, daemon=True).start()
    assert run(source) == 143
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    assert signal.getsignal(signal.SIGTERM) is before


def started(config: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "taming.launcher", "--cpu", "2", "vq", "train", str(config)]
    return subprocess.Popen(
        [*command, "-o", f"training.output={out}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_says_once_how_it_ended(tmp_path: Path) -> None:
    config, out = tmp_path / "vq.yaml", tmp_path / "run"
    every = {"evaluate_every": 10**6, "preview_every": 10**6, "checkpoint_every": 10**6}
    config.write_text(yaml.safe_dump(vq_values(training={**TINY_TRAINING, "steps": 10**6, **every})))

    mistake = started(config, out, "-o", "training.batch_size=5")
    told = mistake.communicate(timeout=120)[1]
    assert mistake.returncode == 2
    assert told.count("error: ") == len(told.strip().splitlines()) == 1

    unknown = started(config, out, "-o", "training.nonsense=5")
    told = unknown.communicate(timeout=120)[1]
    assert unknown.returncode == 2
    assert told.count("error") == len(told.strip().splitlines()) == 1

    running = started(config, out)
    log, end = out / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    told = running.communicate(timeout=120)[1]
    assert running.returncode == 143, told
    assert told.count("stopped by SIGTERM") == 1
    assert list((out / "checkpoints").glob("step-*/manifest.json"))
