"""What processes agree on: to stop, to fail, what to start from; and runs of two processes in trouble."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image

from stage1_vq.config import VQTrainConfig
from stage1_vq.task import VQTask
from stage1_vq.train import train
from taming.config import build_config
from taming.errors import DataError, FaultError, UserError
from taming.training import loop
from taming.training.agreement import Agreement
from taming.training.checkpoint import list_checkpoints
from tests.conftest import TINY_TRAINING, vq_values
from tests.ranks import run_ranks


def agree(rank: int) -> list[Any]:
    """Each kind of agreement once; what this process learnt."""
    dist.init_process_group("gloo")
    agreement = Agreement()
    learnt: list[Any] = [
        agreement.on_step(0, None, Counter(truncated=rank)),
        agreement.on_step(signal.SIGINT if rank else 0, None, Counter()),
        # Who leaves anyway does not fail.
        agreement.on_step(signal.SIGTERM if rank else signal.SIGINT, DataError("late"), Counter()),
        agreement.equal("same"),
        agreement.equal(f"of {rank}"),
        agreement.together(lambda: rank),
    ]
    for failing, kind in ((1, DataError), (0, FaultError)):
        try:
            agreement.on_step(0, kind("broken") if rank == failing else None, Counter())
        except UserError as error:
            learnt.append((type(error), str(error), error.everywhere))
    return learnt


def test_processes_agree() -> None:
    first, second = run_ranks(agree, 2)
    assert first.error is None
    for outcome in (first, second):
        assert outcome.result[:5] == [
            (0, Counter(truncated=1)),
            (signal.SIGINT, Counter()),
            (signal.SIGTERM, Counter()),
            None,
            ["of 0", "of 1"],
        ]
        assert outcome.result[6:] == [
            (UserError, "process 1 of 2: broken", True),
            (FaultError, "process 0 of 2: broken", True),
        ]
    assert (first.result[5], second.result[5]) == (0, 1)


def config(**changes: Any) -> VQTrainConfig:
    return build_config(VQTrainConfig, vq_values(**changes))


def train_on_own_folder(rank: int, folder: Path) -> None:
    data = {"kind": "folder", "root": str(folder / f"seen_by_{rank}"), "size": 16, "validation_fraction": 0.2}
    train(config(data=data), folder / "run")


def test_seven_and_five_samples_on_two_processes_are_refused_at_once(tmp_path: Path) -> None:
    for rank, count in enumerate((8, 6)):  # of which one is held out
        (tmp_path / f"seen_by_{rank}").mkdir()
        for n in range(count):
            Image.new("RGB", (16, 16), (n, 0, 0)).save(tmp_path / f"seen_by_{rank}/{n}.png")
    outcomes = run_ranks(train_on_own_folder, 2, tmp_path)
    for outcome in outcomes:
        assert isinstance(outcome.error, UserError)
        assert "process 0: 7 pictures" in str(outcome.error)
        assert "process 1: 5 pictures" in str(outcome.error)
        assert outcome.seconds < 30
    assert not (tmp_path / "run/config.yaml").exists()


TRAINING = {**TINY_TRAINING, "evaluate_every": 3, "checkpoint_every": 100}


def stop_and_go_on(rank: int, folder: Path, when: str) -> int:
    """A run that one process of two is told to end, in a step or in an evaluation; then its resumption."""
    if rank == 1:
        if when == "step":
            name, of = "train_step", 2
        else:
            name, of = "evaluate", 1
        real, calls = getattr(VQTask, name), []

        def told_to_stop(self: VQTask, *arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == of:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.01)
            return real(self, *arguments)

        setattr(VQTask, name, told_to_stop)
    with pytest.raises(loop.Interrupted) as stopped:
        train(config(training=TRAINING), folder)
    dist.barrier()
    saved = [path.name for path in list_checkpoints(folder / "checkpoints")]
    assert saved[-1] == ("step-00000002" if when == "step" else "step-00000003"), saved
    train(config(training=TRAINING), folder)
    return stopped.value.exit_code


def whole_run(rank: int, folder: Path) -> None:
    train(config(training=TRAINING), folder)


@pytest.mark.parametrize("when", ["step", "evaluation"])
def test_a_signal_to_one_process_stops_all_and_loses_nothing(tmp_path: Path, when: str) -> None:
    outcomes = run_ranks(stop_and_go_on, 2, tmp_path / "stopped", when)
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert [outcome.result for outcome in outcomes] == [128 + signal.SIGTERM] * 2
    run_ranks(whole_run, 2, tmp_path / "whole")
    found = [path.read_bytes() for path in sorted((tmp_path / "stopped/checkpoints/step-00000004").iterdir())]
    wanted = [path.read_bytes() for path in sorted((tmp_path / "whole/checkpoints/step-00000004").iterdir())]
    names = [path.name for path in sorted((tmp_path / "whole/checkpoints/step-00000004").iterdir())]
    differ = [name for name, a, b in zip(names, found, wanted, strict=True) if a != b]
    # The log holds times, and so its size may differ by a digit.
    assert not {name for name in differ if name.endswith(".safetensors")}


def die_in_a_step(rank: int, folder: Path) -> None:
    if rank == 1:
        VQTask.train_step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    train(config(training=TRAINING), folder)


def test_a_process_that_is_killed_is_named_by_the_others(tmp_path: Path) -> None:
    survivor, killed = run_ranks(die_in_a_step, 2, tmp_path / "run")
    assert killed.exit_code == -signal.SIGKILL
    assert isinstance(survivor.error, FaultError)
    assert "process 1 (pid" in str(survivor.error)
    assert "died" in str(survivor.error)
    assert survivor.seconds < 30
