"""SIGINT and SIGTERM while a run trains: the first asks it to stop, a second one makes it leave at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

SAME_SECONDS = 2.0
"""Signals that follow one another so closely are one: a terminal tells the launcher and its processes, and
the launcher tells its processes again."""
LEAVE_SECONDS = 1.0
"""The main thread has so long to leave by itself after a second signal: it may wait in a library."""
END = b"\0"  # no signal has this number
STOPPING = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """A context in which `received` is the number of the signal that asked the run to stop, else 0."""

    def __init__(self) -> None:
        self.received = 0
        self._first = 0.0
        self._left = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            self._previous = {number: signal.signal(number, self._handle) for number in STOPPING}
        except ValueError:  # not the main thread (a notebook's worker, say): signals are not ours to take
            return self
        # Python's handlers wait for the main thread, which may never come back from an exchange with a dead
        # process. The kernel writes the signal into this pipe at once.
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._previous:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_pipe)
        self._left.set()
        os.write(self._pipe[1], END)
        self._watcher.join()
        for end in self._pipe:
            os.close(end)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > SAME_SECONDS:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        first = None
        while (data := os.read(self._pipe[0], 1)) != END:
            number, now = data[0], time.monotonic()
            if number not in STOPPING:
                continue
            if first is None:
                first = now
            elif now - first > SAME_SECONDS:
                if not self._left.wait(LEAVE_SECONDS):
                    os._exit(128 + number)
                return
