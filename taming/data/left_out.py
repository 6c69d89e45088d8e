"""Pictures that cannot be used and are left out of a data set: few enough, counted, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from taming.data.patience import patiently
from taming.errors import REASONS, BadSample, DataError

T = TypeVar("T")
Item = TypeVar("Item")


class LeftOut:
    """Counts what is left out of the `total` pictures of `source`, of which the share `budget` may be."""

    def __init__(self, source: Path | str, total: int, budget: float) -> None:
        self._source, self._total, self._budget = source, total, budget
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, count: int, first: str) -> None:
        """`count` more are out for `reason`; `first` says what is wrong with the first of them.

        Raises DataError where they are too many.
        """
        assert reason in REASONS
        if not count:
            return
        self._counts[reason] += count
        self._first.setdefault(reason, first)
        total = self._counts.total()
        if total > self._budget * self._total:
            raise DataError(
                f"{first}; {total} of {self._total} pictures cannot be used ({self._told()}), more than"
                f" data.skip_budget = {self._budget:g} leaves out; `taming data check {self._source}` lists"
                " them"
            )

    def sift(self, items: Sequence[Item], found: Sequence[T | BadSample]) -> tuple[list[Item], list[T]]:
        """The items of which something was found, and what; those that are bad are out."""
        bad = [error for error in found if isinstance(error, BadSample)]
        for reason in sorted({error.reason for error in bad}):
            errors = [error for error in bad if error.reason == reason]
            self.add(reason, len(errors), str(errors[0]))
        kept = [
            (item, result)
            for item, result in zip(items, found, strict=True)
            if not isinstance(result, BadSample)
        ]
        return [item for item, _ in kept], [result for _, result in kept]

    def notes(self) -> list[str]:
        """What to tell the user, if anything."""
        if not self._counts:
            return []
        first = "; ".join(f"first {reason}: {self._first[reason]}" for reason in sorted(self._first))
        return [f"left {self._told()} out of {self._total} pictures; {first}"]

    def _told(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self._counts.items()))


def attempt(read: Callable[[], T]) -> T | BadSample:
    """What `read` gives, or what is wrong with the sample that it reads."""
    try:
        return patiently(read)
    except BadSample as error:
        return error
