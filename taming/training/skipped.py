"""Samples that a run skipped, by reason: counted, told, and too many of them end it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from taming.data.dataset import PictureDataset
from taming.errors import DataError


class Skipped:
    """The counts of a whole run, over all processes."""

    def __init__(self, data: PictureDataset, counts: Mapping[str, int] | None = None) -> None:
        self._length, self._budget = len(data), data.skip_budget
        self.counts = Counter(counts or {})

    def add(
        self, counts: Counter[str], pictures: int, examples: Mapping[str, str] | None = None
    ) -> str | None:
        """Take in those of a step, of a run that has seen `pictures` by then; what to tell the user, if any.

        `examples` say of reasons what was wrong with the first sample, where this process has met one.

        Raises DataError past the budget: its share of the data, or of the pictures seen where they are more.
        """
        if not counts:
            return None
        first = [reason for reason in counts if not self.counts[reason]]
        self.counts += counts
        named = "".join(f"; {examples[reason]}" for reason in first if examples and reason in examples)
        total, allowed = self.counts.total(), self._budget * max(self._length, pictures)
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))
        if total > allowed:
            raise DataError(
                f"{total} bad samples ({reasons}) of {pictures} are more than data.skip_budget = "
                f"{self._budget:g} of the data allows; find them with `taming data check`, mend or remove "
                f"them, or raise data.skip_budget{named}"
            )
        # Each new reason, and then at 10, 100, 1000: a note a picture would bury the others.
        before = total - counts.total()
        if first or len(str(total)) > len(str(before)):
            told = f"bad samples replaced by others so far: {reasons}"
            return f"{told}; `taming data check` names the files{named}"
        return None
