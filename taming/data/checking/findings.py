"""What is found wrong with the files of a data set, and how the search is spread over threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from taming.errors import REASONS, BadSample, DataError

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int, int], None]
"""Takes (checked so far, how many there are)."""

FINDINGS = (*REASONS, "too small", "duplicate")
"""Besides what makes a sample bad: less pixels than the crop, and the same bytes or name as another file."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    path: str
    """The file; of one in a shard SHARD:MEMBER."""
    reason: str
    """One of FINDINGS."""
    detail: str
    """A sentence that names the file, and the way out."""
    others: tuple[str, ...] = ()
    """Of duplicates: the other files of the group."""


@dataclass
class Findings:
    """Collects what is wrong, so that a search goes on after the first."""

    found: list[Finding] = field(default_factory=list)

    def add(self, path: object, reason: str, detail: str, others: Iterable[object] = ()) -> None:
        assert reason in FINDINGS
        self.found.append(Finding(str(path), reason, detail, tuple(map(str, others))))

    @contextmanager
    def catch(self, path: object, reason: str = "mismatched") -> Iterator[None]:
        """What is raised about `path` is a finding; the block ends there. `reason` is for errors without."""
        try:
            yield
        except BadSample as error:
            self.add(path, error.reason, str(error))
        except DataError as error:
            self.add(path, reason, str(error))


def duplicates(groups: Iterable[Sequence[object]]) -> Iterator[Finding]:
    """One finding for each group of several files of equal bytes."""
    findings = Findings()
    for first, *others in groups:
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            detail = f"{first} holds the same bytes as {others[0]}{more}; keep one"
            findings.add(first, "duplicate", detail, others)
    return iter(findings.found)


def in_threads(function: Callable[[T], R], items: Iterable[T], workers: int | None) -> Iterator[R]:
    """`function` of each item, in order; some work is done ahead, never all of it at once.

    Threads, not processes: Pillow, hashing and NumPy let go of the interpreter where the time goes.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
