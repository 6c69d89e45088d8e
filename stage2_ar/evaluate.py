"""How probable held-out pictures are to a pipeline, and how well its samples follow their maps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stage1_vq.inputs import model_input
from stage2_ar.pipeline import ARPipeline
from stage2_ar.transformer import code_log_likelihood
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.errors import UserError
from taming.metrics.adherence import Prototypes, adherence


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
    nats, cells, pictures, pixels = 0.0, 0, 0, 0
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        batch = to_device(batch, pipe.device)
        codes = pipe.tokenizer.encode(model_input(batch, pipe.tokenizer.config))
        nats -= float(code_log_likelihood(pipe.model(codes, batch), codes.flatten(1)).sum())
        cells, pictures = cells + codes.numel(), pictures + len(codes)
        pixels += batch["image"][:, 0].numel()
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
