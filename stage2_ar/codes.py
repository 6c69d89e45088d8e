"""Pre-encoded codes as a data set, read from the folders that `taming vq encode` writes.

The same training loop reads them as it reads pictures: a sample has "codes" in place of "image".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.codes import CodeIndex, Split, read_index, read_shards
from stage1_vq.inputs import model_input
from taming.data.dataset import PictureDataset
from taming.data.transforms import uniforms
from taming.errors import DataError
from taming.types import Batch


class CodeDataset(PictureDataset):
    """Codes (h, w) with their labels and maps; every epoch takes one of the stored views of a sample."""

    def __init__(self, root: Path, split: Split) -> None:
        self.root, self.split = root, split
        self.index: CodeIndex = read_index(root)
        shards = list(read_shards(root, self.index, split))
        if not shards:
            raise DataError(
                f"{root} holds no {split} codes (it has {', '.join(self.index.splits) or 'none'}); encode a "
                "data set with a validation_fraction above 0"
            )
        names = shards[0][0].keys()
        self.columns: dict[str, Tensor] = {
            name: torch.cat([tensors[name] for tensors, _ in shards]) for name in names
        }
        self.keys: list[str] = [key for _, entry in shards for key in entry["keys"]]
        self.plain: dict[str, list[Any]] = {
            name: [value for _, entry in shards for value in entry[name]]
            for name in ("text", "objects")
            if name in shards[0][1]
        }
        # Each sample has what its views say; earlier folders say one thing for all views.
        if not self.index.told_by_view:
            self.plain = {
                name: [[value] * self.index.views for value in rows] for name, rows in self.plain.items()
            }
        factor = self.index.downsample_factor
        self.size = (self.index.grid[0] * factor, self.index.grid[1] * factor)
        self.num_labels = self.index.num_labels
        self.class_names = self.index.class_names
        self.object_names = self.index.object_names
        self.provides = frozenset({"codes", "key", *self.columns, *self.plain})

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, index: int, epoch: int, *, seed: int = 0) -> dict[str, Any]:
        """Sample `index`: view 0 for epoch -1, else one that is a function of (seed, epoch, key)."""
        key = self.keys[index]
        view = 0
        if epoch >= 0 and self.index.views > 1:
            view = int(uniforms(seed, epoch, key, 1)[0] * self.index.views)
        sample: dict[str, Any] = {"key": key}
        for name, values in self.columns.items():
            sample[name] = values[index] if name == "label" else values[index, view]
        if "label" in sample:
            sample["label"] = int(sample["label"])
        for name, rows in self.plain.items():
            sample[name] = rows[index][view]
        return sample

    def texts(self) -> Iterator[str]:
        for views in self.plain.get("text", []):
            yield from views

    def fingerprint(self) -> str:
        """sha256 over the tokenizer's hash, the keys and the codes."""
        digest = hashlib.sha256(self.index.tokenizer_hash.encode())
        digest.update("\n".join(self.keys).encode())
        digest.update(self.columns["codes"].numpy().tobytes())
        if self.index.told_by_view:
            digest.update(json.dumps([self.plain, list(self.object_names)]).encode())
        return digest.hexdigest()


def codes_of(tokenizer: VQModel, batch: Batch) -> Tensor:
    """(B, h, w) int64 of a batch on the tokenizer's device: stored ones, or its pictures'."""
    if "codes" in batch:
        codes: Tensor = batch["codes"]
        return codes
    return tokenizer.encode(model_input(batch, tokenizer.config))
