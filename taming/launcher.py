"""Several processes of one run on this machine: one for each GPU, or some on the CPU.

What `torchrun` does, for one machine, without a wall of text where a process ends: a run's own words and its
exit code are what remains, and a run that is told to stop has all the time that it needs to save itself.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)

POLL_SECONDS = 0.05
GRACE_SECONDS = 30.0
"""Where one process failed, the others have so long to notice it and to say what they know."""
MISTAKE = 2
"""Exit code of a user's mistake, which all processes meet: the first that says it speaks for all."""


@app.command(
    help=__doc__, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def launch(
    processes: Annotated[int, typer.Argument(min=1, help="How many: as many as there are GPUs, usually.")],
    command: Annotated[list[str], typer.Argument(help="What is written after `taming`: vq train CONFIG ...")],
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU, whatever else there is.")] = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Spread weights, gradients and optimiser states over them (ar train)."),
    ] = False,
) -> None:
    wishes = {"ACCELERATE_USE_CPU": "true"} if cpu else {}
    if fsdp:
        wishes |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    raise typer.Exit(run_processes([sys.executable, "-m", "taming", *command], processes, wishes))


def run_processes(command: Sequence[str], processes: int, environment: Mapping[str, str]) -> int:
    """Run `command` in several processes that find each other; the exit code of the first that failed, or 0.

    SIGTERM and SIGINT are passed on, as often as they come.
    """
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1))),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        **environment,
    }
    with _signals() as received:
        started = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        try:
            return _watch(started, received)
        finally:
            for process in started:
                process.kill()  # where it has ended, nothing happens


def _watch(started: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait for all processes; the exit code of the first that failed, as a shell would give it."""
    running, failed, deadline = list(started), list[int](), float("inf")
    while running:
        time.sleep(POLL_SECONDS)
        while received:
            _send(running, received.pop(0))
        codes = [code for process in running if (code := process.poll())]
        running = [process for process in running if process.poll() is None]
        if codes and not failed:
            deadline = time.monotonic() + GRACE_SECONDS
            if MISTAKE in codes:
                _send(running, signal.SIGTERM)
        failed += codes
        if time.monotonic() > deadline:
            _send(running, signal.SIGKILL)
    # One that left of itself says more than one that was killed.
    return next((code for code in failed if code > 0), 128 - failed[0] if failed else 0)


def _send(started: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in place of what they do."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


if __name__ == "__main__":
    app()
