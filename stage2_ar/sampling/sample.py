"""Drawing codes from a transformer.

Every picture and every cell has its own random number, made up front, and a code is the inverse of the
cumulative distribution in the vocabulary's order: what is drawn depends neither on the batch nor on the
schedule.

Axes: B pictures, N cells, V codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stage2_ar.order import Grid, to_raster
from stage2_ar.sampling.guidance import GuidanceSchedule, check_guidance, guided, scale_at
from stage2_ar.transformer import Transformer
from taming.errors import UserError
from taming.types import Prefix

Progress = Callable[[int, int], None]
"""Called with (cells done, cells in all) as sampling goes on."""

StepKind = Literal["auto", "eager", "static"]

Known = tuple[Tensor, Tensor]
"""Codes (B, h, w) int64 and a mask (B, h, w) bool: where it is True the code is given and stays."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a code is drawn from logits: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    """> 0; logits are divided by it."""
    top_k: int | None = None
    """Keep the k most probable codes, and those that tie with the last of them; more than V keeps all."""
    top_p: float | None = None
    """Keep the smallest set of most probable codes that holds this mass; in (0, 1]."""
    greedy: bool = False
    """Take the most probable code; nothing is drawn."""
    guidance_scale: float = 1.0
    """s in unconditional + s (conditional - unconditional) (Ho and Salimans 2022); 1 is no guidance."""
    guidance_schedule: GuidanceSchedule = "constant"
    """Whether the scale goes from `guidance_start`, at the first cell, to `guidance_scale`, at the last."""
    guidance_start: float = 1.0
    guidance_power: float = 1.0
    """Of the schedule cosine; see `guidance.scale_at`."""

    @property
    def guides(self) -> bool:
        """Whether any cell is guided."""
        return self.guidance_scale != 1 or (self.guidance_schedule != "constant" and self.guidance_start != 1)

    def scale_of(self, cell: int, cells: int) -> float:
        """The scale of guidance of the cell that is written as number `cell` of `cells`."""
        return scale_at(
            cell / max(cells - 1, 1),
            schedule=self.guidance_schedule,
            start=self.guidance_start,
            scale=self.guidance_scale,
            power=self.guidance_power,
        )

    def validate(self, vocabulary_size: int) -> None:
        """Raises UserError for a value outside of its range."""
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature {self.temperature} is not a finite number above 0; for the most probable "
                "code each time ask for greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(
                f"top_k {self.top_k} is not at least 1; the vocabulary has {vocabulary_size} codes, leave it "
                "out to keep all"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is not in (0, 1]; leave it out to keep all codes")
        check_guidance(
            schedule=self.guidance_schedule,
            start=self.guidance_start,
            scale=self.guidance_scale,
            power=self.guidance_power,
        )


def picture_uniforms(seed: int, first_picture: int, count: int, cells: int) -> Tensor:
    """Random numbers of pictures first_picture, ...: (count, cells) float64 in [0, 1), on the CPU."""
    return uniforms_of(seed, torch.arange(first_picture, first_picture + count), cells)


def uniforms_of(seed: int, pictures: Tensor, cells: int) -> Tensor:
    """Random numbers of the pictures with these numbers (n,): (n, cells) as in `picture_uniforms`."""
    rows = []
    for picture in pictures.tolist():
        digest = hashlib.sha256(f"{seed}/{picture}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.rand(cells, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def filtered_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits (..., V) -> probabilities (..., V) fp32 after temperature, top-k and top-p."""
    logits = logits.float() / settings.temperature
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        largest = logits.topk(settings.top_k, dim=-1, sorted=False).values
        threshold = largest.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass_before = ordered.cumsum(dim=-1) - ordered
        kept = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, order, mass_before < settings.top_p)
        probabilities = probabilities * kept
    return probabilities


def draw(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> Tensor:
    """One code a row: logits (B, V), uniforms (B,) float64 in [0, 1) -> (B,) int64.

    The code is the first whose cumulative probability passes the uniform.
    """
    if settings.greedy:
        return logits.argmax(dim=-1)
    cumulative = filtered_probabilities(logits, settings).cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1]
    # Just below the total at most, so that rounding never reaches past the last code that was kept.
    target = torch.minimum(uniforms.to(total) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True).squeeze(-1)


def needs_guidance(settings: SamplingSettings, null_prefix: object | None) -> bool:
    """Whether both halves are run. Raises UserError where there is no null prefix to guide away from."""
    if not settings.guides:
        return False
    if null_prefix is None:
        raise UserError(
            f"guidance_scale {settings.guidance_scale} needs a condition that was trained with dropout; "
            "leave it at 1 for this model"
        )
    return True


def stack_prefixes(first: Prefix, second: Prefix) -> Prefix:
    """Two prefixes of equal shapes as one batch, for guidance in one doubled run."""
    cells = None
    if first.cells is not None and second.cells is not None:
        cells = torch.cat((first.cells, second.cells))
    else:
        assert first.cells is None, "a condition and its null must agree about cells"
        assert second.cells is None, "a condition and its null must agree about cells"
    return replace(
        first,
        embeddings=torch.cat((first.embeddings, second.embeddings)),
        mask=torch.cat((first.mask, second.mask)),
        cells=cells,
    )


def sample_codes(
    transformer: Transformer,
    prefix: Prefix,
    null_prefix: Prefix | None,
    grid: Grid,
    uniforms: Tensor,
    settings: SamplingSettings,
    *,
    known: Known | None = None,
    order: Tensor | None = None,
    progress: Progress | None = None,
    cached: bool = True,
    step: StepKind = "auto",
) -> Tensor:
    """Draw grids of codes: (B, h, w) int64 for a prefix of B rows.

    uniforms (B, h * w) float64 from `picture_uniforms`, by raster index as `known`. Cells are written in
    `order` (h * w,), by default the model's own. `null_prefix` is only used with guidance.
    `cached=False` runs the whole sequence again for each cell: a check, not a way to work. `step` says how
    a cell is drawn: auto is one captured graph a step on a CUDA device and eager elsewhere; static has the
    graph's fixed shapes on any device (see `static_step`). All draw the same codes, up to rounding.
    Raises UserError for settings out of range and for a grid larger than the transformer's.
    """
    if transformer.window is not None and cached:
        # Here, for that module builds upon this one.
        from stage2_ar.sampling.windowed import sample_windowed

        return sample_windowed(
            transformer, prefix, null_prefix, grid, uniforms, settings, known=known, progress=progress
        )
    settings.validate(transformer.vocabulary_size)
    guide = needs_guidance(settings, null_prefix)
    if guide and null_prefix is not None:
        prefix = stack_prefixes(prefix, null_prefix)
    with torch.inference_mode():
        codes = _sample(
            transformer, prefix, grid, order, uniforms, settings, guide, known, progress, cached, step
        )
    # Out of inference mode again, so that the codes may take part in training.
    return codes.clone()


def _sample(
    transformer: Transformer,
    prefix: Prefix,
    grid: Grid,
    order: Tensor | None,
    uniforms: Tensor,
    settings: SamplingSettings,
    guide: bool,
    known: Known | None,
    progress: Progress | None,
    cached: bool,
    step: StepKind,
) -> Tensor:
    device = prefix.embeddings.device
    height, width = grid
    batch, count = uniforms.shape[0], height * width
    order = transformer.sequence_cells(grid, device) if order is None else order.to(device)
    # From here on everything is in the order of writing.
    uniforms = uniforms.to(device)[:, order]
    codes = torch.zeros(batch, count, dtype=torch.int64, device=device)
    known_codes, is_known = _flat_known(known, order)
    first = _leading_known(is_known)
    codes[:, :first] = 0 if known_codes is None else known_codes[:, :first]

    def taken(stop: int, start: int = 0) -> Tensor:
        part = codes[:, start:stop]
        return torch.cat((part, part)) if guide else part

    statically = (
        cached and not transformer.training and (step == "static" or (step == "auto" and codes.is_cuda))
    )
    cache = None
    for n in range(first, count):
        if cache is not None and statically:
            # Here, for that module builds upon this one.
            from stage2_ar.sampling.static_step import finish_statically

            given = None if known_codes is None or is_known is None else (known_codes, is_known)
            codes = finish_statically(
                transformer, cache, codes, n, uniforms, settings, guide, given,
                lambda done: None if progress is None else progress(done, count),
            )  # fmt: skip
            break
        if not cached:
            logits = transformer(taken(n + 1), prefix, grid, order)[:, -1]
        elif cache is None:
            logits, cache = transformer.prefill(prefix, taken(n), grid, order=order)
        else:
            logits = transformer.step(taken(n, n - 1), cache)
        logits = guided(logits, settings.scale_of(n, count)) if guide else logits
        drawn = draw(logits, uniforms[:, n], settings)
        if known_codes is not None and is_known is not None:
            drawn = torch.where(is_known[:, n], known_codes[:, n], drawn)
        codes[:, n] = drawn
        if progress is not None:
            progress(n + 1, count)
    return to_raster(codes, order).view(batch, height, width)


def _flat_known(known: Known | None, order: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if known is None:
        return None, None
    codes, mask = known
    return codes.flatten(1).to(order.device)[:, order], mask.flatten(1).to(order.device)[:, order]


def _leading_known(is_known: Tensor | None) -> int:
    """How many cells from the first on are given in all pictures: they are taken in at once."""
    if is_known is None:
        return 0
    missing = (~is_known).any(dim=0).nonzero()
    return int(missing[0]) if len(missing) else is_known.shape[1]
