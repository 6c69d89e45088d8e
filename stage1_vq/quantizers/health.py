"""Codes that stay in use: a start from k-means, and revival of codes that died.

One implementation for every method whose codes are the rows of a table.

Axes: N latents, D code width, K codes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stage1_vq.quantizers.base import Quantizer
from stage1_vq.quantizers.search import nearest_codes
from taming.collective import from_main_process, gather_rows, sum_over_processes
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
    k-means waits for are not saved: a run resumed within its first steps collects them again.
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
        self._settling = False
        self._counts: Tensor | None = None
        self._recent: Tensor | None = None
        self._first: list[Tensor] = []

    @abstractmethod
    def place(self, rows: Tensor, codes: Tensor) -> None:
        """Where `rows` (K,) bool is set, let the code be that row of `codes` (K, D), with all its state."""

    @property
    def waits_for_kmeans(self) -> bool:
        return self.health.kmeans_init and not bool(self.initialised)

    def observe(self, latents: Tensor, indices: Tensor) -> None:
        """Remember what `after_step` needs of latents (N, D) and their codes (N,)."""
        if self.waits_for_kmeans:
            self._first.append(latents)
        if self.health.revive_after is not None:
            counts = torch.bincount(indices, minlength=self.codebook_size)
            self._counts = counts if self._counts is None else self._counts + counts
            self._recent = latents

    def before_step(self, step: int, total_steps: int) -> None:
        """Codes that are merely rare stay where they are near the end of a run."""
        self._settling = step >= SETTLING_FROM * total_steps

    def forget(self) -> None:
        """Drop the latents seen so far: they were not yet those that k-means should start from."""
        self._first.clear()

    @torch.no_grad()
    def after_step(self) -> None:
        """Start from k-means once enough latents were seen; afterwards revive codes that died."""
        if self.waits_for_kmeans:
            wanted = 2 * self.codebook_size
            latents = gather_rows(torch.cat(self._first)) if self._first else self.codebook[:0]
            if len(latents) >= wanted:
                centres = from_main_process(kmeans(latents[: 16 * wanted], self.codebook_size))
                self.place(torch.ones(self.codebook_size, dtype=torch.bool, device=centres.device), centres)
                self.initialised.fill_(True)
                self._first.clear()
        elif self.health.revive_after is not None and self._counts is not None:
            self._revive(self.health.revive_after, self._counts)
        self._counts = self._recent = None

    def _revive(self, revive_after: int, counts: Tensor) -> None:
        counts = sum_over_processes(counts)
        self.steps_unused.add_(1).masked_fill_(counts > 0, 0)
        dead: Tensor = self.steps_unused.ge(revive_after)
        if self.health.revive_below is not None:
            share = counts * (self.codebook_size / counts.sum())
            self.choice_rate.lerp_(share, 1 - RATE_DECAY)
            if not self._settling:
                dead = dead | (self.choice_rate < self.health.revive_below)
        assert self._recent is not None
        if dead.any():
            # The counts are the same on every process, hence this branch; the choice is the main one's.
            picks = torch.randint(len(self._recent), (self.codebook_size,), device=dead.device)
            self.place(dead, from_main_process(self._recent[picks]))
            self.steps_unused.masked_fill_(dead, 0)
            if self.health.revive_below is not None:
                self.choice_rate.masked_fill_(dead, 1)


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
