"""What the processes of a run tell each other once a step: whether to stop, what failed, what was skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from taming.collective import world_size
from taming.errors import REASONS, FaultError, UserError
from taming.training.signals import STOPPING

_T = TypeVar("_T")


class Agreement:
    """Exchanges between all processes of a run; every process must make each call, in the same order.

    They go over the host, so that they wait for no GPU. In a single process they cost nothing.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if world_size() > 1 and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def on_step(
        self, received: int, failure: UserError | None, skipped: Counter[str]
    ) -> tuple[int, Counter[str]]:
        """(the signal that asks all to stop, or 0; what all processes skipped in this step, by reason).

        Raises `failure` on every process where there is one on any, unless all stop.
        """
        if world_size() == 1:
            if failure is not None and not received:
                raise failure
            return received, skipped
        values = [float(received == number) for number in STOPPING]
        values += [float(failure is not None), *(float(skipped[reason]) for reason in REASONS)]
        told = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(told, group=self._group)
        *asked, failed = told[: len(STOPPING) + 1].tolist()
        # SIGTERM goes before SIGINT where both came. What failed while all leave anyway may be of the
        # signal itself: it went to data workers too.
        stop = max((int(n) for n, times in zip(STOPPING, asked, strict=True) if times), default=0)
        if failed and not stop:
            self._raise(failure)
        counts = zip(REASONS, map(int, told[len(STOPPING) + 1 :].tolist()), strict=True)
        return stop, Counter({reason: number for reason, number in counts if number})

    def stop_asked(self, received: int) -> int:
        """The signal that asks all to stop, or 0."""
        return self.on_step(received, None, Counter())[0]

    def together(self, function: Callable[[], _T]) -> _T:
        """What `function` gives here; where it raises UserError on one process, every process raises it."""
        failure: UserError | None = None
        result: Any = None
        try:
            result = function()
        except UserError as error:
            failure = error
        self.on_step(0, failure, Counter())
        return result

    def equal(self, value: str) -> list[str] | None:
        """Every process's `value`, by rank, where they differ; else None."""
        if world_size() == 1:
            return None
        values: list[Any] = [None] * world_size()
        dist.all_gather_object(values, value, group=self._group)
        return None if len(set(values)) == 1 else values

    def _raise(self, failure: UserError | None) -> None:
        """Raise the failure of the first process that has one: its text everywhere."""
        texts: list[Any] = [None] * world_size()
        mine = None if failure is None else (str(failure), isinstance(failure, FaultError))
        dist.all_gather_object(texts, mine, group=self._group)
        rank, (text, fault) = next((rank, told) for rank, told in enumerate(texts) if told is not None)
        error = (FaultError if fault else UserError)(
            text if all(texts) else f"process {rank} of {len(texts)}: {text}"
        )
        error.everywhere = True
        raise error
