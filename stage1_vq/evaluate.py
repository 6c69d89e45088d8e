"""How well a tokenizer keeps pictures: figures over a data set, and a sheet to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stage1_vq.model import VQModel
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.errors import UserError
from taming.metrics.codebook import count_codes, perplexity, usage
from taming.metrics.psnr import psnr


@dataclass(frozen=True)
class Evaluation:
    """Figures of a whole data set, and of each picture."""

    figures: dict[str, float]
    """psnr (mean over pictures, dB), l1, code_usage in [0, 1], perplexity in [1, K], pictures."""
    pictures: list[tuple[str, float, float]] = field(default_factory=list)
    """(key, psnr, l1) each."""


@torch.no_grad()
def evaluate_tokenizer(
    model: VQModel,
    dataset: PictureDataset,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Reconstruct every picture of `dataset`, centre-cropped, and compare in [-1, 1]."""
    if not len(dataset):
        raise UserError("there are no pictures to evaluate on; choose another --split or more data")
    model = model.to(device).eval()
    counts = torch.zeros(model.spec.codebook_size, dtype=torch.int64, device=device)
    rows: list[tuple[str, float, float]] = []
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        images = to_device(batch, device)["image"]
        codes, reconstruction = reconstruct(model, images)
        counts += count_codes(codes, len(counts))
        l1 = (reconstruction - images).abs().flatten(1).mean(1)
        rows += zip(batch["key"], psnr(reconstruction, images).tolist(), l1.tolist(), strict=True)
        if progress is not None:
            progress(len(rows), len(dataset))
    figures = {
        "psnr": sum(row[1] for row in rows) / len(rows),
        "l1": sum(row[2] for row in rows) / len(rows),
        "code_usage": float(usage(counts)),
        "perplexity": float(perplexity(counts)),
        "pictures": len(rows),
    }
    return Evaluation(figures, rows)


def reconstruct(model: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) in [-1, 1] -> (codes (B, h, w), what they decode to, clamped to [-1, 1])."""
    codes = model.encode(images)
    return codes, model.decode(codes).clamp(-1, 1)
