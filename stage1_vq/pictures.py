"""Pictures one by one for a tokenizer: at their own size, or all at one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from stage1_vq.config import VQModelConfig
from stage1_vq.inputs import data_for, model_input, read_input
from taming.data.batch import to_device
from taming.data.folder import list_pictures
from taming.data.source import open_split


def numbered_inputs(
    source: str, size: tuple[int, int] | None, config: VQModelConfig, overrides: Sequence[str] = ()
) -> Iterator[tuple[int, str, Tensor]]:
    """(how many in all, key, the model's input (C, H, W)) of a folder, a config's data or "scenes".

    Files of a folder keep their own size where `size` is None, cropped about the centre to whole cells.
    Raises UserError.
    """
    folder = Path(source)
    if size is None and folder.is_dir() and not overrides:
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
