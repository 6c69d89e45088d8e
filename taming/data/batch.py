"""Batches: put together, checked once, and moved to where the model is.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from taming.errors import DataError
from taming.types import Batch

PICTURES = ("image", "condition_image", "low_resolution")
MAPS = ("segmentation", "depth", "edges")
KEYS = (*PICTURES, *MAPS, "crop", "codes", "label", "objects", "text", "key")
_WHOLE_NUMBERS, _SHARES = "int64", "float32 in [0, 1]"
_FORMS = {
    "label": (1, _WHOLE_NUMBERS),
    "segmentation": (3, _WHOLE_NUMBERS),
    "depth": (4, _SHARES),
    "edges": (4, _SHARES),
    "crop": (2, _SHARES),
}
"""Key -> (axes, type) of all that is no picture."""


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
            # torch's own, which lays them straight into the memory that a data worker shares.
            batch[name] = default_collate(values)
        elif isinstance(first, int):
            batch[name] = torch.tensor(values, dtype=torch.int64)
        else:
            batch[name] = values
    return batch


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Pictures become float32 in [-1, 1], depth, edges and crop float32, labels int64, all on `device`."""
    moved: Batch = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            moved[name] = value
            continue
        tensor = value.to(device, non_blocking=True)
        if name in PICTURES:
            moved[name] = _to_float(tensor)
        elif name in _FORMS and _FORMS[name][1] == _SHARES:
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
        if name in PICTURES or name in _FORMS:
            _check_tensor(name, value)
        if name in ("image", *MAPS):
            pixels[name] = (int(value.shape[-2]), int(value.shape[-1]))
    if len(set(pixels.values())) > 1:
        raise DataError(f"the maps of a batch differ from the picture in size (H, W): {pixels}")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise DataError(f"batch[{name!r}] is {type(value).__name__}, not a tensor")
    axes, kinds = _FORMS.get(name, (4, "uint8, or float in [-1, 1]"))
    right_kind = value.dtype == torch.int64 if kinds == _WHOLE_NUMBERS else value.is_floating_point()
    if name in PICTURES:
        right_kind |= value.dtype == torch.uint8
    channels = {"depth": 1, "edges": 1, "crop": 4}.get(name)
    fits = value.ndim == axes and (channels is None or value.shape[1] == channels)
    if not fits or not right_kind:
        raise DataError(
            f"batch[{name!r}] is {tuple(value.shape)} {value.dtype}; it must have {axes} axes and be {kinds}"
        )


def _option(name: str) -> str:
    return "class_labels" if name == "label" else name
