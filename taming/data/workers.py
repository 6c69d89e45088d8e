"""Processes that read ahead: one function over a stream of jobs, its results in the order of the jobs.

torch's own loader is not used: it raises a dead worker's error wherever the main thread happens to be, be
it in a save or in an exchange between processes, its workers print tracebacks on Ctrl-C, and its shared
memory is bounded by /dev/shm, which containers keep at 64 MB. Here a worker's end is found when its turn
comes, and named.
"""

from __future__ import annotations

import atexit
import gc
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from taming.data.parcel import Parcel, unpack
from taming.errors import FaultError, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

AHEAD = 4
"""Jobs that each worker is given at a time."""
PATIENCE_SECONDS = 300.0
"""A worker that takes longer for a job hangs."""
_HELD = (signal.SIGINT, signal.SIGTERM)
_WATCH_SECONDS = 1.0


class Workers(Iterator[Result], Generic[Job, Result]):
    """`function` of each job, in order, worked out by `workers` >= 1 processes.

    Results may hold tensors of the CPU; they come through shared memory of `room` bytes a job where that is
    enough, else through a pipe, and are pinned if `pin`. `rank` is the number of this process, for messages.
    A UserError of the function is raised here as it is, once its turn comes; another error as a
    RuntimeError with the worker's traceback. Raises FaultError where a worker died or has given nothing
    for `patience` seconds. Workers leave SIGINT and SIGTERM to this process and end when it does.
    """

    def __init__(
        self,
        function: Callable[[Job], Result],
        jobs: Iterator[Job],
        *,
        workers: int,
        room: int = 0,
        rank: int = 0,
        patience: float = PATIENCE_SECONDS,
        pin: bool = False,
    ) -> None:
        assert workers >= 1
        self._workers: list[_Worker] = []
        self._jobs, self._rank, self._patience, self._pin = jobs, rank, patience, pin
        self._owner, self._turn = os.getpid(), 0
        if not _open:  # after multiprocessing's own, and so called before it
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _open.add(self)
        with _signals_held():
            for number in range(workers):
                try:
                    self._workers.append(_start(number, function, room))
                except OSError as error:
                    self.close()
                    raise FaultError(
                        f"process {rank} could not start data worker {number} of {workers}"
                        f" ({error.strerror}); set training.workers lower"
                    ) from None
        try:
            for _ in range(AHEAD):
                for worker in self._workers:
                    self._give(worker)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Result:
        if not self._workers:
            raise StopIteration
        worker = self._workers[self._turn % len(self._workers)]
        if not worker.owed:  # jobs are dealt in turn: there are none left anywhere
            self.close()
            raise StopIteration
        try:
            if not worker.connection.poll(self._patience):
                raise FaultError(self._hangs(worker))
            kind, result = self._receive(worker)
        except (EOFError, OSError):
            raise FaultError(self._died(worker)) from None
        finally:
            self._turn += 1
        worker.owed -= 1
        self._give(worker)
        if kind == "result":
            return result
        self.close()
        if kind == "refusal":
            raise result
        raise RuntimeError(f"{self._name(worker)} failed:\n{result}")

    def close(self) -> None:
        """End the workers. They only read, so that nothing is lost."""
        if os.getpid() != self._owner:
            return  # the copy of this object in a process that was forked from ours
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.connection.close()
        _open.discard(self)

    def __del__(self) -> None:
        if self._workers:  # not when the interpreter ends: what close needs may be gone
            self.close()

    def _give(self, worker: _Worker) -> None:
        job = next(self._jobs, None)
        if job is None:
            return
        with suppress(OSError):  # it died: what it still gave is taken first
            worker.connection.send((worker.given % AHEAD, job))
        worker.given += 1
        worker.owed += 1

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        kind, place, size, rest = pickle.loads(worker.connection.recv_bytes())
        if kind != "result":
            return kind, pickle.loads(rest)
        block = torch.empty(size, dtype=torch.uint8, pin_memory=self._pin and size > 0)
        if place is None:
            if size:
                worker.connection.recv_bytes_into(block.numpy().data)
        else:
            assert worker.shared is not None
            start = place * worker.room
            block.copy_(worker.shared[start : start + size])
        return kind, unpack(rest, block)

    def _name(self, worker: _Worker) -> str:
        return f"data worker {worker.number} (pid {worker.process.pid}) of process {self._rank}"

    def _hangs(self, worker: _Worker) -> str:
        name = self._name(worker)
        self.close()
        return (
            f"{name} gave nothing for {self._patience:g} s and was stopped: the disk or the network that the"
            " pictures lie on does not answer, or one of them takes so long to decode; look at it, and go on"
            " with --resume auto"
        )

    def _died(self, worker: _Worker) -> str:
        name = self._name(worker)
        worker.process.join(_WATCH_SECONDS)
        code = worker.process.exitcode
        self.close()
        if code is None or code >= 0:
            what = "went away" if code is None else f"ended with exit code {code}"
        else:
            what = f"was killed by {_signal_name(-code)}"
        ways = "set training.workers lower (0 reads in the main process) and go on with --resume auto"
        if code == -signal.SIGKILL:
            return (
                f"{name} {what}, often by the system for want of memory (dmesg tells); use smaller pictures"
                f" or a smaller batch, or {ways}"
            )
        return f"{name} {what}; a damaged picture may do that: try `taming data check`, or {ways}"


_open: weakref.WeakSet[Workers[Any, Any]] = weakref.WeakSet()


def _close_all() -> None:
    # multiprocessing asks its processes to end by SIGTERM, which workers ignore, and would wait for ever.
    for workers in list(_open):
        workers.close()


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    room: int
    shared: Tensor | None
    """(AHEAD * room,) uint8: one place a job, in turn."""
    given: int = 0
    owed: int = 0


def _start(number: int, function: Callable[[Any], Any], room: int) -> _Worker:
    # A fork shares what the data set holds in memory. Elsewhere it is not safe, and memory that has no name
    # cannot be handed over.
    forked = sys.platform == "linux"
    context: Any = multiprocessing.get_context("fork" if forked else "spawn")
    ours, theirs = context.Pipe()
    room = -(-room // mmap.PAGESIZE) * mmap.PAGESIZE if forked else 0
    memory = mmap.mmap(-1, AHEAD * room) if room else None
    process = context.Process(
        target=_serve,
        args=(function, theirs, memory, room, os.getpid()),
        name=f"data-worker-{number}",
        daemon=True,
    )
    process.start()
    theirs.close()  # so that its end is seen here
    shared = None if memory is None else torch.frombuffer(memory, dtype=torch.uint8)
    return _Worker(number, process, ours, room, shared)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait until a fork has had the time to say that they are not meant for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# What follows runs in the worker.


def _serve(
    function: Callable[[Any], Any], connection: Connection, memory: mmap.mmap | None, room: int, parent: int
) -> None:
    for number in _HELD:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    torch.set_num_threads(1)
    gc.freeze()  # a collection would touch, and so copy, all that came from the parent
    shared = None if memory is None else torch.frombuffer(memory, dtype=torch.uint8)
    jobs: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs, parent), daemon=True).start()
    while True:
        place, job = jobs.get()
        try:
            parcel = Parcel(function(job))
        except UserError as error:
            connection.send_bytes(pickle.dumps(("refusal", 0, 0, pickle.dumps(error))))
        except MemoryError:
            fault = FaultError(
                "a data worker ran out of memory; set training.workers or the batch size lower"
            )
            connection.send_bytes(pickle.dumps(("refusal", 0, 0, pickle.dumps(fault))))
        except Exception:  # raised by the main process
            connection.send_bytes(pickle.dumps(("failure", 0, 0, pickle.dumps(traceback.format_exc()))))
        else:
            _send(connection, parcel, place, shared, room)


def _send(connection: Connection, parcel: Parcel, place: int, shared: Tensor | None, room: int) -> None:
    if shared is not None and parcel.size <= room:
        parcel.write(shared[place * room : (place + 1) * room])
        connection.send_bytes(pickle.dumps(("result", place, parcel.size, parcel.rest)))
        return
    connection.send_bytes(pickle.dumps(("result", None, parcel.size, parcel.rest)))
    if parcel.size:
        block = torch.empty(parcel.size, dtype=torch.uint8)
        parcel.write(block)
        connection.send_bytes(block.numpy().data)


def _listen(connection: Connection, jobs: queue.SimpleQueue[tuple[int, Any]], parent: int) -> None:
    """Take jobs in at once, so that the main process never waits to give one; end when it does."""
    try:
        while os.getppid() == parent:
            if connection.poll(_WATCH_SECONDS):
                jobs.put(connection.recv())
    except (EOFError, OSError):
        pass
    os._exit(0)
