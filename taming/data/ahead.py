"""A thread that makes the next items while the last is in use: the same items in the same order."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

ITEMS = 2
"""So many wait at most."""
LEAVE_SECONDS = 5.0
_CHECK_SECONDS = 0.5


class Ahead(Iterator[T]):
    """What `items` gives, made by a thread; an error is raised when its turn comes.

    `items` is used by that thread alone. The thread ends with this object, or on `close`.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._made: queue.Queue[tuple[str, Any]] = queue.Queue(ITEMS)
        self._closed = threading.Event()
        self._over = False
        # The thread must not hold this object, which would then never end.
        self._thread = threading.Thread(
            target=_make, args=(items, self._made, self._closed), name="reads-ahead", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, self._closed.set)

    def __next__(self) -> T:
        if self._over or self._closed.is_set():
            raise StopIteration
        kind, value = self._made.get()
        if kind == "item":
            return value
        self._over = True
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread, once it has made what it is at; a disk that does not answer is not waited for."""
        self._closed.set()
        with suppress(queue.Empty):  # it may wait for a place
            while True:
                self._made.get_nowait()
        self._thread.join(LEAVE_SECONDS)


def _make(items: Iterator[Any], made: queue.Queue[tuple[str, Any]], closed: threading.Event) -> None:
    kind = "item"
    while kind == "item" and not closed.is_set():
        try:
            value = next(items)
        except StopIteration:
            kind, value = "end", None
        except BaseException as error:  # raised where it is waited for
            kind, value = "error", error
        while not closed.is_set():
            try:
                made.put((kind, value), timeout=_CHECK_SECONDS)
                break
            except queue.Full:
                continue
