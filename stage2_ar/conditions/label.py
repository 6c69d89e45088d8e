"""A class label as one prefix position."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stage2_ar.conditions.base import Condition, Grid, all_attended, check_range, whole_numbers
from stage2_ar.conditions.config import ClassConditionConfig
from taming.data.dataset import PictureDataset
from taming.errors import UserError
from taming.types import Batch, Prefix


class ClassCondition(Condition):
    """A row of its own table, or the entry of that number in the transformer's (published models)."""

    keys: Mapping[str, str] = {"class": "label"}

    def __init__(self, config: ClassConditionConfig, *, width: int) -> None:
        super().__init__(0.0 if config.shared_vocabulary else config.dropout)
        self.num_classes = config.num_classes
        self.embedding: nn.Embedding | None = None
        self.null_embedding: nn.Parameter | None = None
        if not config.shared_vocabulary:
            self.embedding = nn.Embedding(config.num_classes, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            if self.has_null:
                self.null_embedding = nn.Parameter(torch.randn(width) * 0.02)

    def prefix_length(self, grid: Grid) -> int:
        return 1

    def check(self, batch: Batch, grid: Grid) -> None:
        if "label" not in batch:
            raise UserError("the class condition needs class labels; the data has none (use sub-folders)")
        label = batch["label"]
        if label.ndim != 1:
            raise UserError(f"class labels of shape {tuple(label.shape)} are not (B,): one a picture")
        check_range("class", label, self.num_classes, "classes")

    def check_data(self, data: PictureDataset) -> None:
        if "label" not in data.provides:
            raise UserError(
                "condition.kind=class needs class labels, and the data has none; put pictures into a "
                "sub-folder a class and set data.class_labels=true"
            )
        if data.num_classes > self.num_classes:
            raise UserError(
                f"the data has {data.num_classes} classes, but condition.num_classes is {self.num_classes}; "
                f"set condition.num_classes={data.num_classes}"
            )

    def example(self, batch_size: int, grid: Grid) -> Batch:
        return {"label": torch.zeros(batch_size, dtype=torch.int64)}

    def embed(self, batch: Batch, grid: Grid) -> Prefix:
        table = self.shared_table if self.embedding is None else self.embedding
        embeddings = table(batch["label"])[:, None]
        return Prefix(embeddings, all_attended(embeddings))

    def null(self, batch_size: int, grid: Grid, device: torch.device | str) -> Prefix:
        if self.null_embedding is None:
            raise UserError(
                "this class condition was trained without dropout: it has no null to guide away from"
            )
        embeddings = self.null_embedding.to(device).expand(batch_size, 1, -1)
        return Prefix(embeddings, all_attended(embeddings))

    def _shape(self, name: str, value: Tensor) -> Tensor:
        return whole_numbers(name, value).reshape(1) if value.ndim == 0 else whole_numbers(name, value)
