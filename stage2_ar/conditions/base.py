"""What every condition gives to the transformer.

A condition owns its embeddings, so that its vocabulary never collides with the picture's. (Published
models share one table: their conditions say so in the config and are attached to the transformer's.)

Axes: B samples, P prefix positions, h w cells, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from stage2_ar.chance import sample_uniforms
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch, Prefix, Segment

Grid = tuple[int, int]

WindowPrefix = Callable[[int, int], Prefix]
"""(top, left) of a window, in cells -> its prefix."""


class Condition(nn.Module, ABC):
    """Turns a batch into a `Prefix`; in training mode it is replaced by null at random."""

    keys: Mapping[str, str] = {}
    """User's name of each condition -> key of the batch ("class" -> "label")."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.part = ""
        """What tells it from the other parts of a combined condition."""
        # In a list, so that the table stays the transformer's parameter and is not counted or saved twice.
        self._attached: list[nn.Embedding] = []

    @property
    def has_null(self) -> bool:
        """Whether `null` was trained, so that guidance means something."""
        return self.dropout > 0

    @abstractmethod
    def prefix_length(self, grid: Grid) -> int:
        """P for a grid (h, w)."""

    @abstractmethod
    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        """The prefix that says nothing, shaped as that of `forward`."""

    @abstractmethod
    def check(self, batch: Batch, grid: Grid) -> None:
        """Raises UserError where the batch's condition is missing or cannot be used."""

    @abstractmethod
    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        """The prefix of a checked batch."""

    @abstractmethod
    def check_data(self, data: PictureDataset) -> None:
        """Raises UserError where a data set does not have what the condition needs, before training."""

    @abstractmethod
    def example(self, batch_size: int, grid: Grid) -> Batch:
        """The smallest valid batch for a grid (h, w), to estimate memory and to test with."""

    def derive(self, batch: Batch) -> Batch:
        """The batch with what can be made of it, where a user gave no condition of his own: edges, say."""
        return batch

    def forward(self, batch: Batch, grid: Grid) -> Prefix:
        """The prefix of a batch for a grid (h, w), which may be larger than the transformer's.

        In training mode each sample is replaced by null with the probability `dropout`: which ones follows
        from the batch's `chance`, where it has one.
        Raises UserError where the condition is missing, out of range or of the wrong size.
        """
        batch = self.derive(batch)
        self.check(batch, grid)
        return self.drop(self.embed(batch, grid), grid, batch)

    def drop(self, prefix: Prefix, grid: Grid, batch: Batch) -> Prefix:
        """In training mode: each sample's prefix replaced by null with the probability `dropout`."""
        if not (self.training and self.dropout > 0):
            return prefix
        size, device = prefix.embeddings.shape[0], prefix.embeddings.device
        if "chance" in batch:
            seed, step = batch["chance"]
            draws = sample_uniforms(seed, step, batch["key"], f"condition{self.part}", 1)[:, 0].to(device)
        else:
            draws = torch.rand(size, device=device)
        dropped = draws < self.dropout
        return mix_prefixes(dropped, self.null(size, grid, device), prefix)

    def windows(self, batch: Batch, grid: Grid, size: Grid) -> WindowPrefix:
        """The prefixes of windows of `size` cells of a picture of `grid` cells; for sampling.

        The whole picture's condition is embedded once and cropped.
        """
        whole = self(batch, grid)
        return lambda top, left: crop_prefix(whole, top, left, size)

    def null_windows(
        self, batch_size: int, grid: Grid, size: Grid, device: torch.device | str
    ) -> WindowPrefix:
        """As `windows`, of the prefix that says nothing."""
        whole = self.null(batch_size, grid, device)
        return lambda top, left: crop_prefix(whole, top, left, size)

    def attach(self, token_embedding: nn.Embedding) -> None:
        """Give the transformer's table to the condition; only one that shares it makes use of it."""
        self._attached = [token_embedding]

    @property
    def shared_table(self) -> nn.Embedding:
        """The transformer's table, for a condition that shares it."""
        assert self._attached, "a shared vocabulary needs attach(transformer.token_embedding)"
        return self._attached[0]

    def read(self, conditions: Mapping[str, Any], device: torch.device | str = "cpu") -> Batch:
        """A user's conditions ({"class": [3, 7]}) as a batch on `device`, not yet checked.

        Raises UserError for a condition that this model does not know, or that it needs and is missing.
        """
        self.refuse_unknown(conditions)
        for name in self.keys:
            if name not in conditions:
                raise UserError(
                    f'condition {name!r} is missing; give it as {{"{name}": ...}} or with --{name}'
                )
        return {key: self.read_value(name, conditions[name], device) for name, key in self.keys.items()}

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """Raises UserError for a user's name of a condition that this one does not know."""
        for name in names:
            if name not in self.keys:
                known = ", ".join(repr(key) for key in self.keys) or "none: give {}"
                raise UserError(f"this model has no condition {name!r}; it takes {known}")

    def read_value(self, name: str, value: Any, device: torch.device | str) -> Any:
        """One user's value with its batch axis and type, on `device`. Raises UserError."""
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"condition {name!r} is not an array of numbers: {error}") from None
        return self._shape(name, tensor).to(device)

    def _shape(self, name: str, value: Tensor) -> Tensor:
        """One user's tensor with its batch axis and type."""
        return value


def whole_numbers(name: str, value: Tensor) -> Tensor:
    """`value` as int64. Raises UserError where it does not hold whole numbers."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise UserError(f"condition {name!r} holds {value.dtype}; give whole numbers (int64)")
    return value.to(torch.int64)


def check_range(name: str, value: Tensor, size: int, what: str) -> None:
    """Raises UserError where values are not in [0, size)."""
    if value.numel() == 0:
        raise UserError(f"condition {name!r} is empty")
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise UserError(
            f"{name} {wrong} is not one of the {size} {what} (0 to {size - 1}) that the model was built for"
        )


def batch_size_of(batch: Batch) -> int:
    """How many samples a batch has, by any of its entries."""
    for value in batch.values():
        return len(value)
    raise UserError("an empty batch says nothing about its size; use `null` for sampling without a condition")


def mix_prefixes(choose_first: Tensor, first: Prefix, second: Prefix) -> Prefix:
    """Sample by sample one of two prefixes of equal shapes; choose_first (B,) bool."""
    cells = None
    if first.cells is not None and second.cells is not None:
        cells = torch.where(choose_first[:, None, None, None], first.cells, second.cells)
    return replace(
        second,
        embeddings=torch.where(choose_first[:, None, None], first.embeddings, second.embeddings),
        mask=torch.where(choose_first[:, None], first.mask, second.mask),
        cells=cells,
    )


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    """The samples `rows` (n,) int64 of a batch, in that order; a sample may come more than once."""
    numbers = rows.tolist()
    return {
        name: value[rows.to(value.device)] if isinstance(value, Tensor) else [value[n] for n in numbers]
        for name, value in batch.items()
    }


def segments_of(prefix: Prefix) -> tuple[Segment, ...]:
    """The parts of a prefix; they add up to its P positions."""
    return (prefix.embeddings.shape[1],) if prefix.segments is None else prefix.segments


def segment_length(segment: Segment) -> int:
    """How many positions a part has."""
    return segment if isinstance(segment, int) else segment[0] * segment[1]


def join_prefixes(prefixes: list[Prefix]) -> Prefix:
    """Several conditions as one: their positions one after another, what they say of cells summed."""
    cells = [prefix.cells for prefix in prefixes if prefix.cells is not None]
    return Prefix(
        torch.cat([prefix.embeddings for prefix in prefixes], dim=1),
        torch.cat([prefix.mask for prefix in prefixes], dim=1),
        cells=torch.stack(cells).sum(dim=0) if cells else None,
        segments=tuple(segment for prefix in prefixes for segment in segments_of(prefix)),
    )


def crop_prefix(prefix: Prefix, top: int, left: int, size: Grid) -> Prefix:
    """The prefix of a window of `size` (h, w) at (top, left), from the prefix of the whole grid.

    What is aligned with cells is cropped; what is said about the picture as a whole stays.
    """
    height, width = size
    rows, columns = slice(top, top + height), slice(left, left + width)
    if prefix.cells is not None:
        prefix = replace(prefix, cells=prefix.cells[:, rows, columns])
    if prefix.segments is None or all(isinstance(segment, int) for segment in prefix.segments):
        return prefix
    embeddings, masks, segments, start = [], [], [], 0
    for segment in prefix.segments:
        stop = start + segment_length(segment)
        part, mask = prefix.embeddings[:, start:stop], prefix.mask[:, start:stop]
        if not isinstance(segment, int):
            part = rearrange(part, "b (h w) d -> b h w d", h=segment[0])[:, rows, columns]
            mask = rearrange(mask, "b (h w) -> b h w", h=segment[0])[:, rows, columns]
            segment = part.shape[1], part.shape[2]
            part, mask = rearrange(part, "b h w d -> b (h w) d"), rearrange(mask, "b h w -> b (h w)")
        embeddings.append(part)
        masks.append(mask)
        segments.append(segment)
        start = stop
    return replace(
        prefix,
        embeddings=torch.cat(embeddings, dim=1),
        mask=torch.cat(masks, dim=1),
        segments=tuple(segments),
    )


def all_attended(embeddings: Tensor) -> Tensor:
    """A mask (B, P) that hides no position of embeddings (B, P, D)."""
    return torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device)
