"""Batches: put together, checked once, and moved to where the model is.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from taming.errors import DataError
from taming.types import Batch

PICTURES = ("image", "condition_image")
MAPS = ("segmentation", "depth")
KEYS = (*PICTURES, *MAPS, "codes", "label", "objects", "text", "key")


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples of one dataset -> a batch: arrays stacked, whole numbers as int64, the rest as lists.

    Pictures of 8 and of 16 bits in one batch become float in [-1, 1].
    """
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        if isinstance(first, Tensor):
            if len({value.dtype for value in values}) > 1:
                values = [_to_float(value) for value in values]
            batch[name] = torch.stack(values)
        elif isinstance(first, int):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = values
    return batch


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Pictures become float32 in [-1, 1], depth float32, labels int64, all on `device`."""
    moved: Batch = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            moved[name] = value
            continue
        tensor = value.to(device, non_blocking=True)
        if name in PICTURES:
            moved[name] = _to_float(tensor)
        elif name == "depth":
            moved[name] = tensor.float()
        else:
            moved[name] = tensor.long()
    return moved


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels.float()


def validate_batch(batch: Batch, required: Collection[str]) -> None:
    """Check a batch from a loader or in a step. Raises DataError for a key that is missing or malformed."""
    missing = sorted(set(required) - set(batch))
    if missing:
        raise DataError(
            f"the data gives {', '.join(sorted(batch)) or 'nothing'}, but {', '.join(missing)} is needed too;"
            f" set {' and '.join(f'data.{_option(name)}' for name in missing)}, or choose another condition"
        )
    unknown = sorted(set(batch) - set(KEYS))
    if unknown:
        raise DataError(f"a batch has the unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    sizes = {name: len(value) for name, value in batch.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"the parts of a batch differ in their number of samples: {sizes}")
    pixels: dict[str, tuple[int, int]] = {}
    for name, value in batch.items():
        if name in (*PICTURES, *MAPS, "label"):
            _check_tensor(name, value)
        if name in ("image", *MAPS):
            pixels[name] = (int(value.shape[-2]), int(value.shape[-1]))
    if len(set(pixels.values())) > 1:
        raise DataError(f"the maps of a batch differ from the picture in size (H, W): {pixels}")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"batch[{name!r}] is {type(value).__name__}, not a tensor")
    axes, kinds = {
        "label": (1, "int64"),
        "segmentation": (3, "int64"),
        "depth": (4, "float32 in [0, 1]"),
    }.get(name, (4, "uint8, or float in [-1, 1]"))
    right_kind = {
        "label": value.dtype == torch.int64,
        "segmentation": value.dtype == torch.int64,
        "depth": value.is_floating_point(),
    }.get(name, value.dtype == torch.uint8 or value.is_floating_point())
    channels = name != "depth" or value.ndim != 4 or value.shape[1] == 1
    if value.ndim != axes or not right_kind or not channels:
        raise DataError(
            f"batch[{name!r}] is {tuple(value.shape)} {value.dtype}; it must have {axes} axes and be {kinds}"
        )


def _option(name: str) -> str:
    return "class_labels" if name == "label" else name
