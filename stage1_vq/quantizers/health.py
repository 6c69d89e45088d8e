"""Codes that stay in use: a start from k-means, and revival of codes that died.

One implementation for every method whose codes are the rows of a table.

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.search import nearest_codes
from taming.collective import choose_rows, from_main_process, gather_rows, sum_over_processes, world_size
from taming.config import Config

RATE_DECAY = 0.98
"""What the running mean of how often a code is chosen keeps each step."""
SETTLING_FROM = 0.8


class TableConfig(Config):
    """What all methods with a table of codes share."""

    codebook_size: int = Field(default=1024, ge=2)
    code_dim: int = Field(default=256, ge=1)
    kmeans_init: bool = False
    """Start from the k-means centres of the first latents instead of noise."""
    revive_after: int | None = Field(default=None, ge=1)
    """Replace a code that was not chosen for this many steps by a recent latent; null: never."""
    revive_below: float | None = Field(default=None, gt=0, lt=1)
    """Replace as well a code that is chosen less than this share of the average, by a running mean: evens the
    codes out. Needs revive_after; rests in the last fifth of a run, in which codes and averages settle."""

    @model_validator(mode="after")
    def _revives_at_all(self) -> Self:
        if self.revive_below is not None and self.revive_after is None:
            raise ValueError("revive_below does nothing without revive_after; set both, or neither")
        return self


class TableQuantizer(Quantizer):
    """A quantizer with a table of codes, which calls `observe` on what it quantises in training.

    Buffers exist only where an option needs them, so that published states load strictly. The latents that
    k-means waits for are no part of the model: `FirstLatents` has them for checkpoints.

    Counts, k-means and revival look at the whole step: at all micro-batches of all processes, in the order
    of the pictures, so that their choices depend on neither.
    """

    initialised: Tensor
    steps_unused: Tensor
    choice_rate: Tensor

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config.codebook_size, config.code_dim)
        self.health = config
        if config.kmeans_init:
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        if config.revive_after is not None:
            self.register_buffer("steps_unused", torch.zeros(config.codebook_size, dtype=torch.int64))
        if config.revive_below is not None:
            self.register_buffer("choice_rate", torch.ones(config.codebook_size))
        self._started = not config.kmeans_init
        self._settling = False
        self._step = 0
        self._seen: list[tuple[Tensor, Tensor]] = []
        self.first: list[Tensor] = []
        """Of all processes, (N, D) a step: what k-means waits to have enough of."""

    @abstractmethod
    def place(self, rows: Tensor, codes: Tensor) -> None:
        """Where `rows` (K,) bool is set, let the code be that row of `codes` (K, D), with all its state."""

    def move(self, latents: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Let codes follow this process's latents (N, D) of a step and their codes (N,), where they do so.

        `counts` (K,) int64 says how often each was chosen on all processes.
        """

    @property
    def waits_for_kmeans(self) -> bool:
        # The flag is read from the device until it is set, not in every step.
        self._started = self._started or bool(self.initialised)
        return not self._started

    @property
    def follows(self) -> bool:
        """Whether `after_step` needs what was chosen."""
        return self.health.revive_after is not None or self.waits_for_kmeans

    def observe(self, latents: Tensor, indices: Tensor) -> None:
        """Remember what `after_step` needs of latents (N, D) and their codes (N,)."""
        if self.observing and self.follows:
            self._seen.append((latents, indices))

    def before_step(self, step: int, total_steps: int) -> None:
        """Codes that are merely rare stay where they are near the end of a run."""
        self._step = step
        self._settling = step >= SETTLING_FROM * total_steps

    def forget(self) -> None:
        """Drop the latents seen so far: they were not yet those that k-means should start from."""
        self.first.clear()
        self._seen.clear()

    def forget_step(self) -> None:
        self._seen.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        """Move codes; start from k-means once enough latents were seen; afterwards revive codes that died."""
        if not self._seen:
            return
        latents, indices = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        counts = sum_over_processes(torch.bincount(indices, minlength=self.codebook_size))
        self.move(latents, indices, counts)
        if self.waits_for_kmeans:
            self._start_from(latents)
        elif self.health.revive_after is not None:
            self._revive(self.health.revive_after, latents, counts)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._started = not self.health.kmeans_init
        super()._load_from_state_dict(*args, **kwargs)

    def _start_from(self, latents: Tensor) -> None:
        self.first.append(gather_rows(latents))
        if sum(map(len, self.first)) >= 2 * self.codebook_size:
            first = torch.cat(self.first)[: 32 * self.codebook_size]
            centres = from_main_process(kmeans(first, self.codebook_size))
            self.place(torch.ones(self.codebook_size, dtype=torch.bool, device=centres.device), centres)
            self.initialised.fill_(True)
            self.first.clear()

    def _revive(self, revive_after: int, latents: Tensor, counts: Tensor) -> None:
        self.steps_unused.add_(1).masked_fill_(counts > 0, 0)
        dead: Tensor = self.steps_unused.ge(revive_after)
        if self.health.revive_below is not None:
            share = counts * (self.codebook_size / counts.sum())
            self.choice_rate.lerp_(share, 1 - RATE_DECAY)
            if not self._settling:
                dead = dead | (self.choice_rate < self.health.revive_below)
        if dead.any():  # the same on every process, as the counts are
            # A function of the step, not of a process's own random numbers.
            generator = torch.Generator().manual_seed(self._step)
            among = len(latents) * world_size()
            picks = torch.randint(among, (self.codebook_size,), generator=generator).to(dead.device)
            codes = torch.zeros(self.codebook_size, self.code_dim, device=dead.device)
            codes[dead] = choose_rows(latents, picks[dead])
            self.place(dead, codes)
            self.steps_unused.masked_fill_(dead, 0)
            if self.health.revive_below is not None:
                self.choice_rate.masked_fill_(dead, 1)


class FirstLatents(nn.Module):
    """The latents that the tables of a quantizer wait for k-means with: state of a run, not of the model."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        # In a tuple, so that they are no part of this module.
        self._tables = tuple(part for part in quantizer.modules() if isinstance(part, TableQuantizer))

    def get_extra_state(self) -> Tensor:
        """(N, 1 + D): the number of a table, and a latent of it."""
        rows = [
            torch.cat((latents.new_full((len(latents), 1), number), latents), 1).cpu()
            for number, table in enumerate(self._tables)
            for latents in table.first
        ]
        return torch.cat(rows) if rows else torch.zeros(0, 1)

    def set_extra_state(self, state: Tensor) -> None:
        for number, table in enumerate(self._tables):
            latents = state[state[:, 0] == number, 1:]
            table.forget()
            table.first += [latents.to(table.codebook.device)] if len(latents) else []


def kmeans(latents: Tensor, num_centres: int, iterations: int = 10) -> Tensor:
    """Centres (num_centres, D) of the latents (N, D), N >= num_centres, by Lloyd's method.

    Starts from evenly spread latents and keeps a centre that lost all of its latents on a random one; the
    result is a function of `latents` alone.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(latents), generator=generator).to(latents.device)
    centres = latents[order[:num_centres]].clone()
    for _ in range(iterations):
        nearest = nearest_codes(latents, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        counts = torch.bincount(nearest, minlength=num_centres)
        spare = torch.randint(len(latents), (num_centres,), generator=generator).to(latents.device)
        means = sums / counts.clamp(min=1)[:, None]
        centres = torch.where((counts > 0)[:, None], means, latents[spare])
    return centres
