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

from taming.data.parcel import Parcel, unpack
from taming.data.workers import AHEAD, Workers
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


@pytest.mark.parametrize("room", [0, 4096])
def test_results_come_in_the_order_of_the_jobs(room: int) -> None:
    for jobs, number in ((0, 1), (1, 3), (2, 3), (23, 1), (23, 3)):
        with running(square, iter(range(jobs)), workers=number, room=room) as workers:
            results = list(workers)
        assert [int(result["square"][0]) for result in results] == [job * job for job in range(jobs)]
        assert len({result["pid"] for result in results}) == min(jobs, number)
        assert os.getpid() not in {result["pid"] for result in results}
        assert all(result["threads"] == 1 for result in results)
        # Each result owns its memory: later ones do not write over it.
        assert all(result["square"].is_contiguous() for result in results)


def test_tensors_of_all_kinds_travel_and_larger_ones_than_expected() -> None:
    def make(job: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(job)
        return {
            "bytes": torch.randint(0, 255, (job, 3), generator=generator, dtype=torch.uint8),
            "strided": torch.randn(4, job + 1, generator=generator).T,
            "none": torch.empty(0),
            "one": torch.tensor(job),
            "rest": [("a", {"b": None}), torch.tensor([True, False])],
        }

    with running(make, iter(range(40)), room=256) as workers:
        results = list(workers)
    for job, result in enumerate(results):
        expected = make(job)
        for name in ("bytes", "strided", "none", "one"):
            assert torch.equal(result[name], expected[name])
            assert result[name].dtype == expected[name].dtype
        assert result["rest"][0] == ("a", {"b": None})
        assert result["rest"][1].tolist() == [True, False]
    parcel = Parcel(make(5))
    block = torch.empty(parcel.size, dtype=torch.uint8)
    parcel.write(block)
    assert torch.equal(unpack(parcel.rest, block)["bytes"], make(5)["bytes"])


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

    with running(broken, count()) as workers, pytest.raises(RuntimeError, match="ZeroDivisionError") as bug:
        next(workers)
    assert "data worker 0 (pid " in str(bug.value)

    def starving(job: int) -> int:
        raise MemoryError

    with running(starving, count()) as workers, pytest.raises(FaultError, match="ran out of memory"):
        next(workers)

    def generator() -> Iterator[int]:
        yield 0
        raise ConfigError("no order")

    with pytest.raises(ConfigError, match="no order"):
        Workers(square, generator(), workers=1)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, r"killed by SIGKILL, often by the system for want of memory"),
        (signal.SIGUSR1, r"killed by SIGUSR1; a damaged picture may do that"),
    ],
)
def test_a_dead_worker_is_one_line_that_names_it(number: signal.Signals, told: str) -> None:
    with running(square, count(), workers=3, rank=2) as workers:
        first = next(workers)
        others = [next(workers)["pid"], next(workers)["pid"]]
        os.kill(first["pid"], number)
        with pytest.raises(FaultError, match=told) as error:
            list(islice(workers, 3 * AHEAD + 3))  # what it gave before it died may still come
    text = str(error.value)
    assert text.startswith(f"data worker 0 (pid {first['pid']}) of process 2 was killed by")
    assert "training.workers" in text
    assert "--resume auto" in text
    assert "\n" not in text
    assert not any(map(alive, [first["pid"], *others]))


def test_a_worker_that_hangs_is_stopped_and_named() -> None:
    def function(job: int) -> int:
        if job == 2:
            time.sleep(60)
        return os.getpid()

    with running(function, count(), patience=0.3) as workers:
        pids = [next(workers), next(workers)]
        with pytest.raises(
            FaultError, match=rf"worker 0 \(pid {pids[0]}\) of process 0 gave nothing for 0.3 s"
        ):
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
    assert not any(map(alive, pids))


def test_workers_end_with_their_owner_and_when_it_is_killed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taming.data.workers._WATCH_SECONDS", 0.1)
    workers = Workers(square, count(), workers=2)
    pids = [next(workers)["pid"], next(workers)["pid"]]
    del workers
    assert not any(map(alive, pids))

    def endless(job: int) -> bytes:
        return b"0" * (1 << 20)  # fills the pipe: the worker waits in a write when its parent dies

    for function in (square, endless):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with suppress(BaseException):
                first, second = Workers(function, count(), workers=2), Workers(square, count(), workers=2)
                found = [worker.process.pid for pool in (first, second) for worker in pool._workers]
                os.write(write, " ".join(map(str, found)).encode())
                time.sleep(60)
            os._exit(1)
        pids = [int(word) for word in os.read(read, 1000).split()]
        assert len(pids) == 4
        assert all(map(alive, pids))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert wait_until(lambda found=pids: not any(map(alive, found)), 5), function  # type: ignore[misc]
        os.close(read)
        os.close(write)
    assert "Traceback" not in capfd.readouterr().err
