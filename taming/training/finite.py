"""What all processes know of a step before anything moves, and what becomes of a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from taming.collective import process_rank, sum_over_processes, world_size
from taming.errors import UserError
from taming.training.gradients import whole_norm
from taming.training.host_state import HostState

MOST_IN_A_ROW = 100
"""Steps left out one after another with which a run gives up."""
ALWAYS, MOST_SHARE = 10, 0.1
"""It gives up as well once so many and this share of its steps were left out."""
TOLD = 10
"""So many of them are told one by one."""
REMEDIES = "lower optimizer.learning_rate, set training.clip_norm, use training.precision=fp32"


@dataclass(frozen=True)
class StepValues:
    """A step's values, the same on every process."""

    means: dict[str, Tensor]
    """Detached () fp32 each: means over processes, on the device."""
    read: dict[str, float]
    """The same on the host."""
    wrong: str | None
    """What is not finite, and on which process; None where everything is."""
    norms: dict[str, Tensor]
    """Detached () fp32 each: the lengths of the players' gradients."""
    counts: Tensor | None
    """(K,) int64: the sum of all processes' counts, where they were given."""


def exchange(
    values: Mapping[str, Tensor],
    norms: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None = None,
    counts: Tensor | None = None,
) -> StepValues:
    """Tell all processes this one's `values` of a step; all must call it, with the same names.

    `values` are () each. `norms` are the lengths of the players' averaged gradients, the same on every
    process. `own` tells whose gradient it was: () by player, finite if this process's own gradient was.
    `counts` (K,) are whole numbers. One exchange, and one wait for the device.
    """
    own = own or {}
    row = torch.stack([value.detach().double() for value in (*values.values(), *own.values())])
    table = row.new_zeros(world_size(), len(row))
    table[process_rank()] = row
    parts = [table.flatten()] if counts is None else [table.flatten(), counts.double()]
    told = sum_over_processes(torch.cat(parts))
    rows = told[: table.numel()].view_as(table)
    lengths = [whole_norm(norm).detach().double().reshape(1) for norm in norms.values()]
    host = torch.cat((rows.flatten(), *lengths)).tolist()
    columns = [host[place : table.numel() : len(row)] for place in range(len(row))]
    terms = dict(zip(values, columns[: len(values)], strict=True))
    brought = dict(zip(own, columns[len(values) :], strict=True))
    means = rows.mean(0)[: len(values)].float()
    return StepValues(
        means=dict(zip(values, means.unbind(), strict=True)),
        read={name: sum(column) / len(column) for name, column in terms.items()},
        wrong=_wrong(terms, dict(zip(norms, host[table.numel() :], strict=True)), brought),
        norms={name: length.float().squeeze(0) for name, length in zip(norms, lengths, strict=True)},
        counts=None if counts is None else told[table.numel() :].long(),
    )


class NonFiniteSteps(HostState):
    """Decides over steps in which something is not finite, and counts those that were left out."""

    saved = ("skipped", "in_a_row")

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        super().__init__()
        self.policy = policy
        self.skipped = 0
        """Steps left out since the run began."""
        self.in_a_row = 0
        """Of these, those since the last step that was made."""

    def made(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    def refuse(self, step: int, wrong: str) -> str | None:
        """`step` cannot be made; returns what the user should be told where the run goes on without it.

        Of many only the first ones and every hundredth are told. Raises UserError, the same on every process,
        where the run has to stop.
        """
        if self.policy == "stop":
            raise UserError(
                f"training diverged at step {step}: {wrong} is not finite; nothing was changed by this step: "
                f"{REMEDIES}, or leave such steps out with training.on_nonfinite=skip, and resume"
            )
        self.skipped += 1
        self.in_a_row += 1
        many = None
        if self.in_a_row >= MOST_IN_A_ROW:
            many = f"the last {self.in_a_row} steps were left out"
        elif self.skipped >= ALWAYS and self.skipped > MOST_SHARE * (step + 1):
            many = f"{self.skipped} steps, more than {MOST_SHARE:.0%}, were left out"
        if many is not None:
            raise UserError(
                f"training diverged at step {step}: {wrong} is not finite, and {many}; {REMEDIES}, and resume"
            )
        if self.skipped > TOLD and self.skipped % 100:
            return None
        return f"a step was left out, the {_ordinal(self.skipped)} of the run: {wrong} is not finite"


def _wrong(
    terms: Mapping[str, Sequence[float]],
    norms: Mapping[str, float],
    brought: Mapping[str, Sequence[float]],
) -> str | None:
    """The terms that are not finite or, where all of them are, the gradients; columns of all processes."""
    bad = {name: column for name, column in terms.items() if _bad(column)}
    if not bad:
        bad = {
            f"the gradient of the {name}": brought.get(name, ())
            for name, length in norms.items()
            if not math.isfinite(length)
        }
    together: dict[str, list[str]] = {}
    for name, column in bad.items():
        together.setdefault(_whose(column), []).append(name)
    return "; ".join(", ".join(names) + whose for whose, names in together.items()) or None


def _bad(column: Sequence[float]) -> list[int]:
    return [rank for rank, value in enumerate(column) if not math.isfinite(value)]


def _whose(column: Sequence[float]) -> str:
    ranks = _bad(column)
    if len(column) < 2 or not ranks:
        return ""
    return f" (process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {len(column)})"


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
