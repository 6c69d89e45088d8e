"""Vector quantisation by the nearest code, learned by gradient (van den Oord et al. 2017, arXiv:1711.00937).

Axes: B pictures, D code width, h w cells, N = B h w latents, K codes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage1_vq.quantizers.base import Quantizer
from taming.collective import from_main_process, gather_rows, sum_over_processes
from taming.config import Config
from taming.types import QuantizerOutput

LATENTS_PER_TILE, CODES_PER_TILE = 2048, 2048
"""Distances that the search holds at once: 16 MiB."""


class NearestConfig(Config):
    """The published vector quantizer, and three options that keep its codes in use."""

    kind: Literal["nearest"] = "nearest"
    codebook_size: int = Field(default=1024, ge=2)
    code_dim: int = Field(default=256, ge=1)
    beta: float = Field(default=0.25, ge=0)
    beta_on: Literal["commitment", "codebook"] = "commitment"
    """Which term beta weighs: the paper's commitment term |z - sg(q)|^2, or, as the published weights were
    trained, the codebook term |sg(z) - q|^2."""
    loss_weight: float = Field(default=1.0, ge=0)
    l2_normalised: bool = False
    """Compare directions only (Yu et al. 2022, arXiv:2110.04627, 3.2): latents and codes of length one."""
    kmeans_init: bool = False
    """Start from the k-means centres of the first latents instead of noise."""
    revive_after: int | None = Field(default=None, ge=1)
    """Replace a code that was not chosen for this many steps by a recent latent; null: never."""


class NearestQuantizer(Quantizer):
    """Each latent becomes its nearest code.

    loss = loss_weight * (|z - sg(q)|^2 + beta |sg(z) - q|^2), or beta on the first term; means over all
    elements. The search runs in fp32 whatever the autocast, in chunks of latents.
    """

    def __init__(self, config: NearestConfig) -> None:
        super().__init__(config.codebook_size, config.code_dim)
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        self.initialised: Tensor
        self.steps_unused: Tensor
        # Buffers only where an option needs them, so that the published state loads strictly.
        if config.kmeans_init:
            self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        if config.revive_after is not None:
            self.register_buffer("steps_unused", torch.zeros(config.codebook_size, dtype=torch.int64))
        self._counts: Tensor | None = None
        self._recent: Tensor | None = None
        self._first: list[Tensor] = []

    @property
    def codebook(self) -> Tensor:
        weight = self.embedding.weight.float()
        return F.normalize(weight, dim=1) if self.config.l2_normalised else weight

    def forward(self, z: Tensor) -> QuantizerOutput:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            if self.config.l2_normalised:
                z = F.normalize(z, dim=1)
            flat = rearrange(z, "b d h w -> (b h w) d")
            codebook = self.codebook
            indices = nearest_codes(flat.detach(), codebook.detach())
            chosen = F.embedding(indices, codebook)
            if self.training:
                self._observe(flat.detach(), indices)
            batch, _, height, width = z.shape
            quantized = rearrange(chosen, "(b h w) d -> b d h w", b=batch, h=height, w=width)
            commitment = F.mse_loss(z, quantized.detach())
            moving = F.mse_loss(quantized, z.detach())
            if self.config.beta_on == "commitment":
                loss = moving + self.config.beta * commitment
            else:
                loss = commitment + self.config.beta * moving
            return QuantizerOutput(
                quantized=z + (quantized - z).detach(),
                indices=rearrange(indices, "(b h w) -> b h w", b=batch, h=height, w=width),
                loss=self.config.loss_weight * loss,
                terms={"commitment": commitment.detach()},
            )

    def lookup(self, indices: Tensor) -> Tensor:
        return rearrange(F.embedding(indices, self.codebook), "b h w d -> b d h w")

    @torch.no_grad()
    def after_step(self) -> None:
        """Start from k-means once enough latents were seen; afterwards revive codes that died."""
        if self.config.kmeans_init and not self.initialised:
            wanted = 2 * self.codebook_size
            latents = gather_rows(torch.cat(self._first)) if self._first else self.codebook[:0]
            if len(latents) >= wanted:
                centres = kmeans(latents[: 16 * wanted], self.codebook_size)
                self.embedding.weight.copy_(from_main_process(centres))
                self.initialised.fill_(True)
                self._first.clear()
        elif self.config.revive_after is not None and self._counts is not None:
            self._revive(self.config.revive_after, self._counts)
        self._counts = None

    def _observe(self, flat: Tensor, indices: Tensor) -> None:
        if self.config.kmeans_init and not self.initialised:
            self._first.append(flat)
        if self.config.revive_after is not None:
            counts = torch.bincount(indices, minlength=self.codebook_size)
            self._counts = counts if self._counts is None else self._counts + counts
            self._recent = flat

    def _revive(self, revive_after: int, counts: Tensor) -> None:
        used = sum_over_processes(counts) > 0
        self.steps_unused.add_(1).masked_fill_(used, 0)
        dead: Tensor = self.steps_unused.ge(revive_after)
        assert self._recent is not None
        if dead.any():
            # The counts are the same on every process, hence this branch; the choice is the main one's.
            picks = torch.randint(len(self._recent), (self.codebook_size,), device=dead.device)
            latents = from_main_process(self._recent[picks])
            self.embedding.weight[dead] = latents[dead]
            self.steps_unused.masked_fill_(dead, 0)


def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Index (N,) of the code (K, D) nearest to each latent (N, D); the lower index on a tie.

    |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, and |z|^2 is the same for all codes. The (N, K) distances are never
    held at once: a tile of them is made, and its smallest kept, while it lies in the cache.
    """
    norms = codebook.square().sum(1)
    indices = torch.empty(len(latents), dtype=torch.int64, device=latents.device)
    tile = torch.empty(LATENTS_PER_TILE * CODES_PER_TILE, device=latents.device)
    for row in range(0, len(latents), LATENTS_PER_TILE):
        part = latents[row : row + LATENTS_PER_TILE]
        best = best_index = None
        for first in range(0, len(codebook), CODES_PER_TILE):
            codes = codebook[first : first + CODES_PER_TILE]
            scores = tile[: len(part) * len(codes)].view(len(part), len(codes))
            torch.addmm(norms[first : first + CODES_PER_TILE], part, codes.t(), alpha=-2, out=scores)
            # min with indices is a third faster than argmin on a CPU.
            smallest, index = scores.min(dim=1)
            if best is None or best_index is None:
                best, best_index = smallest, index
            else:
                closer = smallest < best
                best = torch.where(closer, smallest, best)
                best_index = torch.where(closer, index + first, best_index)
        if best_index is not None:
            indices[row : row + LATENTS_PER_TILE] = best_index
    return indices


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
