"""What a run says when the machine takes something from it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from stage1_vq.task import VQTask
from stage1_vq.train import train
from taming.errors import FaultError
from taming.training.lost import Roster
from tests.conftest import vq_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 3)


@pytest.mark.parametrize(
    ("error", "device", "says"),
    [
        (OSError(errno.ENOSPC, "No space left", "/runs/log.jsonl"), CPU, r"the disk is full \(/runs/log"),
        (MemoryError(), CPU, "this process ran out of memory on the CPU"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), GPU, "ran out of memory on cuda:3"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            CPU,
            r"raise training\.accumulation",
        ),
        (
            RuntimeError("CUDA error: device-side assert\nCUDA kernel"),
            GPU,
            r"lost cuda:3 \(CUDA error: device",
        ),
        (torch.AcceleratorError("uncorrectable ECC error encountered"), GPU, r"lost cuda:3 \(uncorrectable"),
    ],
)
def test_faults_are_named_with_the_way_out(error: BaseException, device: torch.device, says: str) -> None:
    explained = Roster().explain(error, device)
    assert explained is not None
    with pytest.raises(FaultError, match=says):
        raise explained
    assert explained.exit_code == 75
    assert "\n" not in str(explained)
    assert "--resume auto" in str(explained)


def test_faults_of_the_toolkit_are_none_of_the_machine() -> None:
    # Without other processes, a broken pipe is not theirs.
    for error in (
        RuntimeError("shapes differ"),
        OSError(errno.ENOENT, "no file"),
        BrokenPipeError("broken pipe"),
    ):
        assert Roster().explain(error, CPU) is None


def test_a_run_out_of_memory_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(VQTask, "train_step", too_much)
    with pytest.raises(FaultError, match="ran out of memory on the CPU"):
        train(vq_config(), tmp_path)
