"""Pictures one by one for a tokenizer, at their own size or all at one, and what it paints as files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.inputs import as_picture, data_for, model_input, read_input, source_key
from taming.data.batch import to_device
from taming.data.folder import list_pictures
from taming.data.picture import save_grey, save_png
from taming.data.source import is_pack, open_split


def numbered_inputs(
    source: str, size: tuple[int, int] | None, config: VQModelConfig, overrides: Sequence[str] = ()
) -> Iterator[tuple[int, str, Tensor]]:
    """(how many in all, key, the model's input (C, H, W)) of a folder, a config's data or "scenes".

    Files of a folder (or of its folder images, segmentation, ... for what the tokenizer takes) keep their own
    size where `size` is None, cropped about the centre to whole cells. Raises UserError.
    """
    folder = Path(source)
    if size is None and folder.is_dir() and not overrides and not is_pack(source):
        key = source_key(config.input)
        inner = folder / ("images" if key == "image" else key)
        folder = inner if inner.is_dir() else folder
        paths = list_pictures(folder)
        return (
            (len(paths), path.relative_to(folder).with_suffix("").as_posix(), read_input(path, config))
            for path in paths
        )
    dataset = open_split(data_for(config, source, size=size or config.resolution, overrides=overrides), "all")

    def samples() -> Iterator[tuple[int, str, Tensor]]:
        for index in range(len(dataset)):
            batch = to_device(dataset.batch([index], [-1]), "cpu")
            yield len(dataset), batch["key"][0], model_input(batch, config)[0]

    return samples()


def save_restored(values: Tensor, config: VQModelConfig, folder: Path, key: str) -> None:
    """Write one restored output (C, H, W) as `folder`/KEY.png.

    Depth is grey of 16 bits, white nearest. Of labels KEY.png shows colours, and labels/KEY.png holds the
    labels. Where a picture cannot hold the channels, KEY.npy holds them, float32 in [-1, 1], and KEY.png
    shows the first.
    """
    path = folder / f"{key}.png"
    if config.input == "segmentation":
        save_grey(values.argmax(0), folder / "labels" / f"{key}.png")
    if config.input == "depth":
        save_grey(((values[0].double() + 1) * 32767.5).round().to(torch.int32), path)
        return
    if config.input != "segmentation" and len(values) in (1, 3, 4):
        save_png(values, path)
        return
    save_png(as_picture(values[None], config)[0], path)
    if config.input != "segmentation":
        np.save(path.with_suffix(".npy"), values.cpu().numpy())
