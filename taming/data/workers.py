"""Processes that read ahead: torch's loader over a stream of jobs, its faults in one line."""

from __future__ import annotations

import gc
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from taming.errors import FaultError, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 4
"""Jobs that each worker is given at a time."""
PATIENCE_SECONDS = 300.0
"""A worker that takes longer for a job hangs."""
_HELD = {signal.SIGINT, signal.SIGTERM}
# What torch's loader says, found by killing, starving and stopping its workers.
_FAULT = re.compile(r"DataLoader (worker|timed out)")
_PIDS = re.compile(r"\(pid(?:\(s\))? ([\d, ]+)\)")
_KILLED_BY = re.compile(r"killed by signal: ([^.]+)\.")


class Workers(Iterator[Result], Generic[Job, Result]):
    """`function` of each job, in order, worked out by `workers` >= 1 processes.

    Results may hold tensors of the CPU; what has a method `pin_memory` is pinned if `pin`. `rank` is the
    number of this process, for messages. A UserError of the function is raised here as it is, once its turn
    comes; another error with the worker's traceback. Raises FaultError where a worker died or has given
    nothing for `patience` seconds; torch raises the death of a worker wherever the main thread is, so that
    whoever works beside it asks `worker_fault` too. Workers leave SIGINT and SIGTERM to this process, and
    end when it does, within 5 seconds if it was killed.
    """

    def __init__(
        self,
        function: Callable[[Job], Result],
        jobs: Iterator[Job],
        *,
        workers: int,
        rank: int = 0,
        patience: float = PATIENCE_SECONDS,
        pin: bool = False,
    ) -> None:
        assert workers >= 1
        self._rank = rank
        loader: DataLoader[Any] = DataLoader(
            _Function(function),
            sampler=_Jobs(jobs),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=AHEAD,
            worker_init_fn=_begin,
            collate_fn=_as_it_is,  # torch's own would turn tuples into lists
            # Without its own it would draw from torch's global stream: training would differ by the number
            # of workers.
            generator=torch.Generator(),
            timeout=patience,
            pin_memory=pin,
        )
        others = set(multiprocessing.active_children())
        with _signals_held():
            self._results: Iterator[tuple[str, Any]] | None = iter(loader)
        self._processes = set(multiprocessing.active_children()) - others

    def __next__(self) -> Result:
        if self._results is None:
            raise StopIteration
        try:
            kind, value = next(self._results)
        except StopIteration:
            self.close()
            raise
        except RuntimeError as error:
            fault = worker_fault(error, self._rank)
            if fault is None:
                raise
            self.close()
            raise fault from error
        if kind == "refusal":
            self.close()
            raise value
        return value

    def close(self) -> None:
        """End the workers. They only read, so that nothing is lost."""
        # torch would wait 5 s for each that does not look up from what it does, and then leave it: it sends
        # SIGTERM, to which they do not listen.
        processes, self._processes = self._processes, set()
        for process in processes:
            with suppress(RuntimeError):  # torch's words on each death
                process.kill()
                process.join()
        self._results = None


def worker_fault(error: BaseException, rank: int) -> FaultError | None:
    """What the user should know where torch's loader says that a worker died or hangs; else None."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not _FAULT.match(text):
        return None
    pids = _PIDS.search(text)
    name = f"a data worker{f' (pid {pids[1]})' if pids else ''} of process {rank}"
    ways = "set training.workers lower (0 reads in the main process) and go on with --resume auto"
    if "timed out" in text:
        return FaultError(
            f"{name} gave nothing for too long and was stopped: the disk or the network that the pictures "
            "lie on does not answer, or one of them takes so long to decode; look at it, and go on with "
            "--resume auto"
        )
    if "shared memory" in text:
        return FaultError(
            f"{name} found no shared memory (/dev/shm is full: docker run --shm-size raises it); or {ways}"
        )
    killer = _KILLED_BY.search(text)
    what = f"was killed ({killer[1]})" if killer else "died"
    if killer is None or killer[1] == "Killed":
        return FaultError(
            f"{name} {what}, often by the system for want of memory (dmesg tells); use smaller pictures or a "
            f"smaller batch, or {ways}"
        )
    return FaultError(f"{name} {what}; a damaged picture may do that: try `taming data check`, or {ways}")


class _Function(Dataset[Any]):
    """The function as torch sees it: a dataset whose index is a job."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, job: Any) -> tuple[str, Any]:
        try:
            return "result", self.function(job)
        except UserError as error:  # torch would wrap it in its traceback
            return "refusal", error


class _Jobs(Sampler[Any]):
    def __init__(self, jobs: Iterator[Any]) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[Any]:
        return self.jobs


def _as_it_is(item: Any) -> Any:
    return item


def _begin(number: int) -> None:
    for held in _HELD:
        signal.signal(held, signal.SIG_IGN)  # the main process decides
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    gc.freeze()  # a collection would touch, and so copy, all that came from the parent


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until a fork has had the time to say that they are not meant for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
