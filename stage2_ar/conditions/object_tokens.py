"""A layout as published: whole numbers that stand before the codes in the same vocabulary.

With T = num_tokens of the table, S = floor(sqrt(T)) sections a side and N = max_objects:

    box      N times (class, top left corner, bottom right corner), then the crop's two corners
    centre   N times (class, centre), then the crop's two corners

- A class is its number (taming-transformers adds num_classes for Open Images' flags; we know none).
- A point (x, y) in [0, 1] is round(y (S - 1)) S + round(x (S - 1)), halves to even.
- An object that is not there is the token T - 1 in all of its places. It is attended like any other.
- Objects were shuffled when those models were trained; here the largest comes first, so that one layout is
  always one sequence.
- With `crop`, boxes are those of the whole picture, all that reach into the frame, and the two last tokens
  are the frame's corners. Without, boxes are cut off at the frame and relative to it. (As published, such
  a box kept its width when its left edge was cut off, and reached too far; here both edges are cut.)

In training data boxes are cut off at the crop already, and so are what is told of the whole picture.

Axes: B layouts, P prefix positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from stage2_ar.conditions.base import Grid, WindowPrefix, all_attended
from stage2_ar.conditions.layout import WHOLE, Layout, LayoutCondition, arranged
from stage2_ar.conditions.objects import ObjectsCondition
from stage2_ar.conditions.objects_config import (
    ObjectFeaturesConfig,
    ObjectsConditionConfig,
    ObjectTokensConfig,
)
from taming.data.boxes import Box, crop_box
from taming.errors import ConfigError, UserError
from taming.types import Batch, Prefix


def build_objects_condition(config: ObjectsConditionConfig, *, width: int) -> LayoutCondition:
    """The condition of a config's encoding."""
    match config.encoding:
        case ObjectFeaturesConfig():
            return ObjectsCondition(config, config.encoding, width=width)
        case ObjectTokensConfig():
            return ObjectTokensCondition(config, config.encoding)


class ObjectTokensCondition(LayoutCondition):
    """Entries of the transformer's table; where it has a null, that is a layout of nothing but padding."""

    def __init__(self, config: ObjectsConditionConfig, encoding: ObjectTokensConfig) -> None:
        super().__init__(config)
        self.num_tokens, self.crop = encoding.num_tokens, encoding.crop
        self.sections = math.isqrt(encoding.num_tokens)

    @property
    def padding(self) -> int:
        """The token of what is not there."""
        return self.num_tokens - 1

    @property
    def tokens_per_object(self) -> int:
        return 3 if self.config.place == "box" else 2

    def prefix_length(self, grid: Grid) -> int:
        return self.config.max_objects * self.tokens_per_object + (2 if self.crop else 0)

    def attach(self, token_embedding: nn.Embedding) -> None:
        """Raises ConfigError where the table has fewer entries than there are tokens."""
        if token_embedding.num_embeddings < self.num_tokens:
            raise ConfigError(
                f"condition.encoding.num_tokens {self.num_tokens} is more than the transformer's table of "
                f"{token_embedding.num_embeddings}; make it smaller, or set transformer.table_size"
            )
        super().attach(token_embedding)

    def embed_layouts(self, layouts: Sequence[Layout], frames: Sequence[Box], grid: Grid) -> Prefix:
        if self.crop:
            layouts = [
                [{"label": item["label"], "box": _uncropped(item["box"], frame)} for item in layout]
                for layout, frame in zip(layouts, frames, strict=True)
            ]
        return self._prefix(layouts, frames)

    def windows(self, batch: Batch, grid: Grid, size: Grid) -> WindowPrefix:
        if not self.crop:
            return super().windows(batch, grid, size)
        self.check(batch, grid)

        def at(top: int, left: int) -> Prefix:
            bottom, right = top + size[0], left + size[1]
            frame = (left / grid[1], top / grid[0], right / grid[1], bottom / grid[0])
            inside = [
                [item for item in layout if crop_box(item["box"], frame) is not None]
                for layout in batch["objects"]
            ]
            return self._prefix(inside, [frame] * len(inside))

        return at

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if not self.has_null:
            raise UserError(
                "this objects condition was trained without dropout: it has no null to guide away from"
            )
        return self._prefix([[]] * batch_size, [WHOLE] * batch_size)

    def tokens(self, layout: Layout, frame: Box) -> list[int]:
        """The P whole numbers of one layout whose boxes are as they are to be told."""
        numbers: list[int] = []
        most = self.config.max_objects
        for item in arranged(layout, most):
            x0, y0, x1, y1 = item["box"]
            corners = (
                ((x0, y0), (x1, y1)) if self.config.place == "box" else (((x0 + x1) / 2, (y0 + y1) / 2),)
            )
            numbers += [item["label"], *(self.point(x, y) for x, y in corners)]
        numbers += [self.padding] * (most * self.tokens_per_object - len(numbers))
        if self.crop:
            numbers += [self.point(frame[0], frame[1]), self.point(frame[2], frame[3])]
        return numbers

    def point(self, x: float, y: float) -> int:
        """The token of a place in [0, 1] x [0, 1]."""
        return round(y * (self.sections - 1)) * self.sections + round(x * (self.sections - 1))

    def _prefix(self, layouts: Sequence[Layout], frames: Sequence[Box]) -> Prefix:
        table = self.shared_table
        rows = [self.tokens(layout, frame) for layout, frame in zip(layouts, frames, strict=True)]
        embeddings = table(torch.tensor(rows, device=table.weight.device))
        return Prefix(embeddings, all_attended(embeddings))


def _uncropped(box: Box, frame: Box) -> Box:
    """A box relative to its frame as one of the whole picture."""
    left, top = frame[0], frame[1]
    width, height = frame[2] - left, frame[3] - top
    x0, y0, x1, y1 = box
    return left + x0 * width, top + y0 * height, left + x1 * width, top + y1 * height
