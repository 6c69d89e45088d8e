from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from taming.data.workers import AHEAD, Workers, worker_fault
from taming.errors import BadSample, ConfigError, FaultError


def square(job: int) -> dict[str, Any]:
    return {"square": torch.full((3,), job * job), "pid": os.getpid(), "threads": torch.get_num_threads()}


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.02)
    return true()


@contextmanager
def running(
    function: Callable[[Any], Any], jobs: Iterator[Any], **options: Any
) -> Iterator[Workers[Any, Any]]:
    workers = Workers(function, jobs, **{"workers": 2, **options})
    try:
        yield workers
    finally:
        workers.close()


def test_results_come_in_the_order_of_the_jobs() -> None:
    state = torch.get_rng_state()
    for jobs, number in ((0, 1), (2, 3), (23, 3)):
        with running(square, iter(range(jobs)), workers=number) as workers:
            results = list(workers)
        assert [int(result["square"][0]) for result in results] == [job * job for job in range(jobs)]
        assert len({result["pid"] for result in results}) == min(jobs, number)
        assert os.getpid() not in {result["pid"] for result in results}
        assert all(result["threads"] == 1 for result in results)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_refusal_keeps_its_kind_and_a_bug_its_traceback() -> None:
    def function(job: int) -> int:
        if job == 3:
            raise BadSample("picture 3.png is cut off", "truncated")
        return job

    with running(function, count()) as workers:
        assert list(islice(workers, 3)) == [0, 1, 2]
        with pytest.raises(BadSample, match=r"^picture 3\.png is cut off$") as refusal:
            next(workers)
        assert refusal.value.reason == "truncated"

    def broken(job: int) -> float:
        return 1 / job

    with running(broken, count()) as workers, pytest.raises(ZeroDivisionError, match="in broken"):
        next(workers)

    def generator() -> Iterator[int]:
        yield 0
        raise ConfigError("no order")

    with pytest.raises(ConfigError, match="no order"):
        Workers(square, generator(), workers=1)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"was killed \(Killed\), often by the system for want of memory"),
        (signal.SIGUSR1, r"was killed \(User defined signal 1\); a damaged picture may do that"),
    ],
)
def test_a_dead_worker_is_one_line_that_names_it(number: signal.Signals, told: str) -> None:
    with running(square, count(), workers=3, rank=2) as workers:
        first = next(workers)
        others = [next(workers)["pid"], next(workers)["pid"]]

        def go_on() -> None:
            # torch says it wherever this thread is: here, or in the loader.
            try:
                os.kill(first["pid"], number)
                time.sleep(0.2)
                list(islice(workers, 3 * AHEAD + 3))
            except RuntimeError as error:
                raise worker_fault(error, 2) or error from error

        with pytest.raises(FaultError, match=told) as error:
            go_on()
    text = str(error.value)
    assert text.startswith(f"a data worker (pid {first['pid']}) of process 2 was killed")
    assert "training.workers" in text
    assert "--resume auto" in text
    assert "\n" not in text
    assert wait_until(lambda: not any(map(alive, [first["pid"], *others])), 5)


def test_other_ends_of_workers_are_told_apart() -> None:
    # torch's words for what cannot be made to happen here.
    bus = (
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
    )
    fault = worker_fault(RuntimeError(bus + "are out of shared memory. Please try to raise your limit."), 0)
    assert "docker run --shm-size" in str(fault)
    fault = worker_fault(RuntimeError("DataLoader worker (pid(s) 3, 4) exited unexpectedly"), 1)
    assert str(fault).startswith("a data worker (pid 3, 4) of process 1 died, often by the system")
    assert worker_fault(RuntimeError("shapes differ"), 0) is None
    assert worker_fault(ValueError("DataLoader worker (pid 7)"), 0) is None


def test_a_worker_that_hangs_is_stopped_and_named() -> None:
    def function(job: int) -> int:
        if job == 2:
            time.sleep(20)
        return os.getpid()

    with running(function, count(), patience=0.3) as workers:
        pids = [next(workers), next(workers)]
        with pytest.raises(FaultError, match="a data worker of process 0 gave nothing for too long"):
            next(workers)
    assert not any(map(alive, pids))


def test_workers_leave_signals_to_the_main_process() -> None:
    with running(square, count()) as workers:
        pids = [next(workers)["pid"], next(workers)["pid"]]
        for pid in pids:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        assert [int(result["square"][0]) for result in islice(workers, 30)] == [n * n for n in range(2, 32)]
        assert all(map(alive, pids))
    assert wait_until(lambda: not any(map(alive, pids)), 5)


@pytest.mark.slow
def test_workers_end_when_their_owner_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            workers = Workers(square, count(), workers=2)
            found = [next(workers)["pid"], next(workers)["pid"]]
            os.write(write, " ".join(map(str, found)).encode())
            time.sleep(60)
        os._exit(1)
    pids = [int(word) for word in os.read(read, 1000).split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert wait_until(lambda: not any(map(alive, pids)), 15)
    os.close(read)
    os.close(write)
    assert "Traceback" not in capfd.readouterr().err
