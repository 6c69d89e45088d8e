"""What a tokenizer is given and gives back: pictures, label maps, depth, edges, or second pictures.

input            read from          the model sees                              and paints
image            image              (B, C, H, W) in [-1, 1]                     the same
condition_image  condition_image    (B, C, H, W) in [-1, 1]                     the same
depth            depth              (B, 1, H, W) in [-1, 1], 1 is nearest       the same
edges            image              (B, 1, H, W), 1 on an edge and -1 off it    the same
segmentation     segmentation       (B, L, H, W) one-hot in {0, 1}              logits (B, L, H, W)

Axes: B pictures, C channels, L labels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stage1_vq.config import InputKind, VQModelConfig
from taming.data.batch import collate, to_device
from taming.data.channels import read_pixels
from taming.data.config import DataConfig
from taming.data.edges import canny
from taming.data.label_colours import paint_labels
from taming.data.picture import read_depth, read_labels
from taming.data.source import data_from, is_pack
from taming.errors import DataError, UserError
from taming.types import Batch


def source_key(kind: InputKind) -> str:
    """The key of the batch that an input is made of."""
    return "image" if kind == "edges" else kind


def model_input(batch: Batch, config: VQModelConfig) -> Tensor:
    """What the model is given of a batch that is on its device, (B, C, H, W) float. Raises DataError."""
    key = source_key(config.input)
    if key not in batch:
        raise DataError(
            f"a tokenizer of {config.input} needs {key} in a batch, which has {', '.join(sorted(batch))}"
        )
    value: Tensor = batch[key]
    match config.input:
        case "segmentation":
            return one_hot(value, config.in_channels)
        case "depth":
            return value.float() * 2 - 1
        case "edges":
            return canny(value)
        case "image" | "condition_image":
            return value


def one_hot(labels: Tensor, num_labels: int) -> Tensor:
    """(B, H, W) int64 in [0, L) -> (B, L, H, W) float32. Raises DataError for labels outside."""
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_labels:
        raise DataError(f"labels lie in [{low}, {high}]; this tokenizer has labels 0 to {num_labels - 1}")
    maps = labels.new_zeros((len(labels), num_labels, *labels.shape[1:]), dtype=torch.float32)
    return maps.scatter_(1, labels[:, None], 1.0)


def restored(painted: Tensor, config: VQModelConfig) -> Tensor:
    """The decoder's output as it is measured and shown: clamped to [-1, 1]; logits stay as they are."""
    return painted.float() if config.input == "segmentation" else painted.float().clamp(-1, 1)


def as_picture(values: Tensor, config: VQModelConfig) -> Tensor:
    """Something to look at of an input or an output (B, C, H, W): (B, 1 or 3, H, W) in [-1, 1].

    Labels get a colour each; of the others see `visible_channels`.
    """
    return paint_labels(values.argmax(1)) if config.input == "segmentation" else visible_channels(values)


def visible_channels(values: Tensor) -> Tensor:
    """Pictures of any number of channels (B, C, H, W) as (B, 1 or 3, H, W).

    RGBA is laid over white; of other counts of channels the first one is shown, or the first three.
    """
    if values.shape[1] == 4:
        return (values[:, :3] + 1) * (values[:, 3:] + 1) / 2 - values[:, 3:]
    return values[:, :3] if values.shape[1] >= 3 else values[:, :1]


def check_input(config: VQModelConfig, gives: Mapping[str, int]) -> None:
    """Whether data that gives these keys with so many channels suits the model. Raises UserError."""
    kind, key = config.input, source_key(config.input)
    if key not in gives:
        raise UserError(
            f"model.input {kind} needs {key}, but the data gives {', '.join(gives)}; set data.{key} to the "
            "folder of it"
        )
    if kind != "edges" and gives[key] != config.in_channels:
        what = {
            "segmentation": f"the data has {gives[key]} labels",
            "image": f"the data's pictures have {gives[key]} channels (data.channels)",
        }.get(kind, f"the data's {key} has {gives[key]} channels")
        raise UserError(f"model.in_channels is {config.in_channels}, but {what}; make them equal")


def data_for(
    config: VQModelConfig, source: str, *, size: tuple[int, int] | int, overrides: Sequence[str] = ()
) -> DataConfig:
    """The data that a user means by `source` (see taming.data.source.data_from) for a tokenizer.

    A plain folder is read as what the tokenizer was trained on: with its channels, and, where there are no
    folders for pictures and maps in it, as the label maps, depth maps or second pictures themselves.
    Raises UserError.
    """
    root, key = Path(source), source_key(config.input)
    values: dict[str, Any] = {}
    if is_pack(source):
        if config.input in ("image", "condition_image"):
            values["channels" if key == "image" else "condition_channels"] = config.in_channels
    elif root.is_dir():
        if key == "image":
            values["channels"] = config.in_channels if config.input == "image" else 3
        else:
            inner = key if (root / key).is_dir() else "."
            values[key] = inner
            values["images"] = "images" if (root / "images").is_dir() and inner != "." else inner
        if key == "segmentation":
            values["num_labels"] = config.in_channels
        if key == "condition_image":
            values["condition_channels"] = config.in_channels
    given = [f"{name}={value}" for name, value in values.items()]
    data = data_from(source, size=size, overrides=[*given, *overrides])
    check_input(config, data.gives)
    return data


def read_input(path: Path, config: VQModelConfig) -> Tensor:
    """One file as the model's input (C, H, W), cropped about its centre to whole cells. Raises DataError."""
    key = source_key(config.input)
    sample: dict[str, Any] = {}
    if key == "segmentation":
        sample[key] = torch.from_numpy(read_labels(path))
        if int(sample[key].max()) >= config.in_channels:
            raise DataError(
                f"map {path} holds label {int(sample[key].max())}; this tokenizer has labels 0 to "
                f"{config.in_channels - 1}"
            )
    elif key == "depth":
        sample[key] = torch.from_numpy(read_depth(path))[None]
    else:
        channels = 3 if config.input == "edges" else config.in_channels
        sample[key] = torch.from_numpy(read_pixels(path, channels))
    sample[key] = _whole_cells(sample[key], config.downsample_factor, path)
    return model_input(to_device(collate([sample]), "cpu"), config)[0]


def _whole_cells(values: Tensor, factor: int, path: Path) -> Tensor:
    rows, columns = values.shape[-2:]
    height, width = rows // factor * factor, columns // factor * factor
    if not height or not width:
        raise DataError(
            f"picture {path} is {columns}x{rows}, smaller than one cell of {factor}x{factor} pixels; "
            "remove it or enlarge it"
        )
    top, left = (rows - height) // 2, (columns - width) // 2
    return values[..., top : top + height, left : left + width]
