"""Functions run as the processes of one run: on this machine, over gloo, each with an end in sight."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

# One server imports torch, once for all tests; the processes of every run are forked from it, in a
# millisecond, and nothing was ever computed in it.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["stage1_vq.train", "stage2_ar.train", "torch.utils.tensorboard.writer"])


@dataclass(frozen=True)
class Outcome:
    """What became of one process."""

    result: Any = None
    error: BaseException | None = None
    exit_code: int | None = 0
    """None: it hung, and was killed."""
    seconds: float = 0.0


def run_ranks(
    function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 60
) -> list[Outcome]:
    """`function(rank, *arguments)` in each of several processes that can find one another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin, started = time.monotonic(), []
    for rank in range(processes):
        ours, theirs = _SERVER.Pipe(duplex=False)
        process = _SERVER.Process(target=_serve, args=(theirs, function, rank, processes, port, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes = []
    for process, connection in started:
        try:
            told = connection.recv() if connection.poll(begin + timeout - time.monotonic()) else Outcome()
        except EOFError:  # it died without a word
            told = Outcome()
        process.join(max(begin + timeout - time.monotonic(), 0.1))
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        outcomes.append(Outcome(told.result, told.error, code, time.monotonic() - begin))
    return outcomes


def _serve(
    connection: Connection,
    function: Callable[..., Any],
    rank: int,
    processes: int,
    port: int,
    arguments: tuple[Any, ...],
) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    try:
        outcome = Outcome(function(rank, *arguments))
    except BaseException as error:
        outcome = Outcome(error=error.with_traceback(None))
    connection.send(outcome)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
