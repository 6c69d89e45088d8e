"""How probable held-out pictures are to a pipeline, and how well its samples follow their maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stage1_vq.codes import INDEX, read_index
from stage2_ar.codes import CodeDataset, codes_of
from stage2_ar.pipeline import ARPipeline
from stage2_ar.transformer import code_log_likelihood
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.data.source import AllSplits, data_from, is_pack, open_split
from taming.errors import UserError
from taming.metrics.adherence import Prototypes, adherence


def open_data(pipe: ARPipeline, source: str, split: str, *, overrides: Sequence[str] = ()) -> PictureDataset:
    """The data that a user means by `source`: a folder of codes, or what `data_from` knows; `split` of it.

    Raises UserError; for codes of another tokenizer too.
    """
    config = pipe.model.config
    if is_pack(source) or not (Path(source) / INDEX).is_file():
        trained = config.grid[0] * config.downsample_factor, config.grid[1] * config.downsample_factor
        return open_split(data_from(source, size=trained, overrides=overrides), split)
    if overrides:
        raise UserError(f"{source} holds codes, which -o {overrides[0]} cannot change; leave it out")
    made_by = read_index(Path(source)).tokenizer_hash
    if not pipe.tokenizer.makes_codes_of(made_by):
        raise UserError(
            f"the codes in {source} were made by the tokenizer {made_by[:12]}, not by the pipeline's "
            f"{config.tokenizer_hash[:12]}; give pictures, or the codes that it was trained on"
        )
    match split:
        case "train" | "validation":
            return CodeDataset(Path(source), split)
        case "all":
            return AllSplits([CodeDataset(Path(source), "train"), CodeDataset(Path(source), "validation")])
        case _:
            raise UserError(f"no split {split!r}: choose all, train or validation")


@torch.no_grad()
def evaluate_pipeline(
    pipe: ARPipeline,
    dataset: PictureDataset,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """nats_per_code, bits_per_code and bits_per_pixel of every picture of `dataset`, and their number."""
    if not len(dataset):
        raise UserError("there are no pictures to evaluate on; choose another --split or more data")
    pipe.model.condition.check_data(dataset)
    nats, cells, pictures, pixels = 0.0, 0, 0, 0
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        batch = to_device(batch, pipe.device)
        codes = codes_of(pipe.tokenizer, batch)
        nats -= float(code_log_likelihood(pipe.model(codes, batch), codes.flatten(1)).sum())
        cells, pictures = cells + codes.numel(), pictures + len(codes)
        pixels += codes.numel() * pipe.model.config.downsample_factor**2
        if progress is not None:
            progress(pictures, len(dataset))
    return {
        "nats_per_code": nats / cells,
        "bits_per_code": nats / cells / math.log(2),
        "bits_per_pixel": nats / pixels / math.log(2),
        "pictures": pictures,
    }


def followed(images: Tensor, maps: Tensor, prototypes: Prototypes) -> tuple[float, float]:
    """Adherence of pictures (B, 3, H, W) to their maps (B, H, W), and to each other's maps.

    The second is the control: what a model that ignores its condition would reach.
    """
    return adherence(images, maps, prototypes), adherence(images, maps.roll(1, dims=0), prototypes)
