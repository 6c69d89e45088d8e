"""Sampling from a transformer with an attention window: any size, each cell at the cost of one token.

Keys and values stay true as the picture goes on, so that each input is taken in once. A row may run C + 1
columns behind the one above, for its cells see no further: in a wavefront several rows go forward as one
batch, and share one ring of keys and values. Every schedule draws the same picture, for each cell has its
own random number.

Axes: B pictures, R = B or 2 B rows of the transformer's batch (guidance doubles it), H W cells of the
picture, A inputs of a step, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from stage2_ar.order import Grid
from stage2_ar.sampling.guidance import guided
from stage2_ar.sampling.sample import (
    Known,
    Progress,
    SamplingSettings,
    draw,
    needs_guidance,
    stack_prefixes,
)
from stage2_ar.sampling.sliding_window import Schedule
from stage2_ar.transformer import Transformer
from stage2_ar.transformer_config import LlamaConfig
from stage2_ar.windowed_attention import WindowCache, WindowPrefill, WindowStep
from taming.types import Prefix


def sample_windowed(
    transformer: Transformer,
    prefix: Prefix,
    null_prefix: Prefix | None,
    grid: Grid,
    uniforms: Tensor,
    settings: SamplingSettings,
    *,
    known: Known | None = None,
    schedule: Schedule = "serial",
    progress: Progress | None = None,
) -> Tensor:
    """Draw grids of codes of any size (H, W): (B, H, W) int64, for a prefix of B rows.

    The transformer must have an attention window. uniforms (B, H * W) float64 from `picture_uniforms`.
    `serial` takes in one cell after another, `wavefront` up to 1 + W / (C + 1) at once: the same work in
    fewer calls. `null_prefix` is only used with guidance.
    Raises UserError for settings out of range and for a prefix whose positions lie on a grid.
    """
    settings.validate(transformer.vocabulary_size)
    guide = needs_guidance(settings, null_prefix)
    if guide and null_prefix is not None:
        prefix = stack_prefixes(prefix, null_prefix)
    device = transformer.token_embedding.weight.device
    codes = torch.zeros(uniforms.shape[0], *grid, dtype=torch.int64, device=device)
    is_known = None
    if known is not None:
        is_known = known[1].to(device)
        codes = torch.where(is_known, known[0].to(device), codes)
    lag = lag_of(transformer, grid, schedule)
    with torch.inference_mode():
        painter = _Painter(transformer, prefix, guide, settings, codes, uniforms.to(device), is_known, lag)
        painter.begin()
        for step, inputs in enumerate(steps_of(grid, lag)):
            if step:
                painter.paint(inputs)
            if progress is not None:
                progress(painter.done, grid[0] * grid[1])
    # Out of inference mode again, so that the codes may take part in training.
    return painter.codes.clone()


def lag_of(transformer: Transformer, grid: Grid, schedule: Schedule) -> int:
    """How many steps after the row above a row begins."""
    assert transformer.window is not None
    # At the width a row begins in the step that takes in the last code of the row above.
    return grid[1] if schedule == "serial" else min(transformer.window[1] + 1, grid[1])


def steps_of(grid: Grid, lag: int) -> list[list[tuple[int, int]]]:
    """The inputs (i, k) of each step; see `windowed_attention`. The first step is the prefix's last."""
    height, width = grid
    return [
        [
            (row, time - row * lag)
            for row in range(max(0, -(-(time - width) // lag)), min(time // lag, height - 1) + 1)
        ]
        for time in range((height - 1) * lag + width)
    ]


@dataclass
class _Painter:
    """Draws the cells of one step after another into `codes`."""

    transformer: Transformer
    prefix: Prefix
    guide: bool
    settings: SamplingSettings
    codes: Tensor
    uniforms: Tensor
    is_known: Tensor | None
    lag: int
    done: int = 0

    def __post_init__(self) -> None:
        _, height, width = self.codes.shape
        window, config = self.transformer.window, self.transformer.config
        assert window is not None
        assert isinstance(config, LlamaConfig)
        self.window, self.config = window, config
        self.uniforms = self.uniforms.view(self.codes.shape)
        self.starts = self.transformer.row_starts(self.prefix)  # (R, D)
        active = min(width // self.lag + 1, height)
        mask = None if bool(self.prefix.mask.all()) else self.prefix.mask
        self.cache = WindowCache(window[0] + active, width + 1, mask)

    def begin(self) -> None:
        """Take in the prefix and draw the first cell."""
        x = self.prefix.embeddings.to(self.starts.dtype)
        if self.prefix.cells is not None:
            x = torch.cat((x[:, :-1], x[:, -1:] + self.prefix.cells[:, :1, 0].to(x.dtype)), dim=1)
        logits = self.transformer.answer(x, WindowPrefill(self.cache))[:, -1:]
        self._draw(logits, self.codes.new_zeros(1), self.codes.new_zeros(1))

    def paint(self, inputs: list[tuple[int, int]]) -> None:
        """Take in inputs (i, k) and draw the cells that they predict."""
        width = self.codes.shape[2]
        places = torch.tensor(inputs, device=self.codes.device)  # (A, 2)
        rows, columns = places[:, 0], places[:, 1]
        carried = self.codes[:, rows, (columns - 1).clamp(min=0)]  # (B, A)
        x = self.transformer.token_embedding(torch.cat((carried, carried)) if self.guide else carried)
        if any(column == 0 for _, column in inputs):
            x = torch.where((columns == 0)[:, None], self.starts[:, None], x)
        predicts = [number for number, (_, column) in enumerate(inputs) if column < width]
        if self.prefix.cells is not None:
            cells = self.prefix.cells[:, rows, columns.clamp(max=width - 1)].to(x.dtype)  # (R, A, D)
            x = x + (cells if len(predicts) == len(inputs) else cells * (columns < width)[:, None])
        step = WindowStep(
            self.cache, places, self.window, self.config.head_dim, self.config.rotary_base, x.dtype
        )
        logits = self.transformer.answer(x, step)
        if len(predicts) < len(inputs):
            index = torch.tensor(predicts, device=self.codes.device)
            logits, rows, columns = logits[:, index], rows[index], columns[index]
        if predicts:
            self._draw(logits, rows, columns)

    def _draw(self, logits: Tensor, rows: Tensor, columns: Tensor) -> None:
        """logits (R, A, V) of the cells at rows and columns, (A,) each."""
        if self.guide:
            _, height, width = self.codes.shape
            cells = (rows * width + columns).tolist()
            scales = [self.settings.scale_of(cell, height * width) for cell in cells]
            logits = guided(logits, torch.tensor(scales, device=logits.device)[:, None])
        uniforms = self.uniforms[:, rows, columns]
        drawn = draw(rearrange(logits, "b a v -> (b a) v"), uniforms.flatten(), self.settings)
        drawn = drawn.view(uniforms.shape)
        if self.is_known is not None:
            drawn = torch.where(self.is_known[:, rows, columns], self.codes[:, rows, columns], drawn)
        self.codes[:, rows, columns] = drawn
        self.done += len(rows)
