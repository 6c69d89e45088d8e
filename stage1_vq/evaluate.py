"""How well a tokenizer keeps pictures: figures over a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stage1_vq.figures import ReconstructionFigures
from stage1_vq.inputs import model_input, restored
from stage1_vq.model import VQModel
from taming.data.batch import to_device
from taming.data.dataset import PictureDataset
from taming.data.loader import evaluation_batches
from taming.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """Figures of a whole data set, and of each picture."""

    figures: dict[str, float]
    """Those of stage1_vq.figures; code_usage in [0, 1], perplexity in [1, K]; the number of pictures."""
    keys: list[str] = field(default_factory=list)
    """The pictures, in the order of the data set."""
    rows: dict[str, list[float]] = field(default_factory=dict)
    """Figure -> its value for each picture."""


@torch.no_grad()
def evaluate_tokenizer(
    model: VQModel,
    dataset: PictureDataset,
    *,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Reconstruct every picture of `dataset`, centre-cropped, and compare."""
    if not len(dataset):
        raise UserError("there are no pictures to evaluate on; choose another --split or more data")
    model = model.to(device).eval()
    figures = ReconstructionFigures(model.config, model.spec.codebook_size, device)
    keys: list[str] = []
    rows: dict[str, list[float]] = {}
    for batch in evaluation_batches(dataset, batch_size=batch_size):
        inputs = model_input(to_device(batch, device), model.config)
        codes, output = reconstruct(model, inputs)
        for name, values in figures.add(inputs, output, codes).items():
            rows.setdefault(name, []).extend(values.tolist())
        keys += batch["key"]
        if progress is not None:
            progress(len(keys), len(dataset))
    return Evaluation({**figures.means(), "pictures": len(keys)}, keys, rows)


def reconstruct(model: VQModel, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (B, C, H, W) -> (codes (B, h, w), what they decode to, clamped to [-1, 1] or logits)."""
    codes = model.encode(inputs)
    return codes, restored(model.decode(codes), model.config)
