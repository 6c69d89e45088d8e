"""What a run says when the machine takes something from it: a process, a GPU, memory, the disk."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from taming.collective import world_size
from taming.data.workers import worker_fault
from taming.disk import NO_ROOM
from taming.errors import FaultError

GO_ON = "go on with --resume auto"
DYING_SECONDS = 2.0
# What gloo and NCCL say when the other end is gone, found by killing it.
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "connection refused",
    "socket closed",
    "remote process exited",
    "socket timeout",
    "no error occurred on socket",
    "watchdog caught collective operation timeout",
)


@dataclass(frozen=True)
class _Process:
    rank: int
    host: str
    pid: int

    @property
    def gone(self) -> bool:
        """Whether it is known to be dead: on this machine alone that can be seen."""
        if self.host != socket.gethostname():
            return False
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
            except OSError:
                return False
            return False
        return state in "ZX"


class Roster:
    """The processes of a run, so that a lost one can be named. Every process must make one."""

    def __init__(self) -> None:
        self.processes: list[_Process] = []
        if world_size() > 1:
            found: list[Any] = [None] * world_size()
            mine = _Process(dist.get_rank(), socket.gethostname(), os.getpid())
            dist.all_gather_object(found, mine)
            self.processes = found

    def explain(self, error: BaseException, device: torch.device) -> FaultError | None:
        """What the user should know of `error`; None where it is no fault of the machine that is known."""
        text = str(error)
        reason = (text.strip().splitlines() or [type(error).__name__])[0]
        lower = text.lower()
        rank = dist.get_rank() if self.processes else 0
        here = f"process {rank}" if self.processes else "this process"
        if (fault := worker_fault(error, rank)) is not None:  # torch says it wherever the main thread is
            return fault
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = f" ({error.filename})" if error.filename else ""
            return FaultError(f"the disk is full{where}: free some space and {GO_ON}")
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in lower:
            return FaultError(
                f"{here} ran out of memory on {_name(device)} ({reason}); raise training.accumulation, lower "
                f"training.batch_size or data.size, or set recompute where there is one, and {GO_ON}"
            )
        if self.processes and any(sign in lower for sign in LOST_PEER):
            gone = self._gone()
            who = ", ".join(f"process {p.rank} (pid {p.pid} on {p.host})" for p in gone)
            what = f"{who} died" if gone else "another process of the run died or cannot be reached"
            return FaultError(
                f"{what}: what it said, if anything, is above; where it said nothing it was killed, often "
                f"for want of memory; {GO_ON}"
            )
        if isinstance(error, torch.AcceleratorError) or "cuda error" in lower or "nccl error" in lower:
            return FaultError(
                f"{here} lost {_name(device)} ({reason}); look at it with nvidia-smi and dmesg, and {GO_ON}"
            )
        return None

    def _gone(self) -> list[_Process]:
        """Processes of this machine that are dead; one whose connection just broke may still be dying."""
        end = time.monotonic() + DYING_SECONDS
        while not (gone := [process for process in self.processes if process.gone]):
            if time.monotonic() > end:
                break
            time.sleep(0.05)
        return gone


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the {device.type.upper()}"
    try:
        return f"{device} ({torch.cuda.get_device_name(device)})"
    except (RuntimeError, AssertionError):  # a lost GPU may not even tell its name
        return str(device)
