"""What a tokenizer keeps of pictures, added up: in training's validation and in `vq eval` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stage1_vq.config import VQModelConfig
from taming.collective import sum_over_processes
from taming.errors import UserError
from taming.metrics.codebook import count_codes, perplexity, usage
from taming.metrics.psnr import psnr
from taming.metrics.segmentation import mean_iou, overlap_counts
from taming.metrics.ssim import WINDOW, ssim

Distance = Callable[[Tensor, Tensor], Tensor]
"""(reconstruction, input), (B, C, H, W) each -> (B,)."""


class ReconstructionFigures:
    """Means over pictures, each counted once, and the use of the codebook.

    psnr (dB), ssim (of pictures of at least 11x11) and l1 in [-1, 1]; of segmentation pixel_accuracy and
    mean_iou, whose mean over a data set is that over its labels. `distances` are further ones by name.
    """

    def __init__(
        self,
        config: VQModelConfig,
        codebook_size: int,
        device: torch.device | str,
        distances: Mapping[str, Distance] | None = None,
    ) -> None:
        self.config = config
        self.distances = dict(distances or {})
        labels = config.in_channels if config.input == "segmentation" else 0
        measured = ("pixel_accuracy", "mean_iou") if labels else ("psnr", "ssim", "l1")
        # Sum and count of each, in an order that all processes share, also those that have no pictures.
        self._sums = {
            name: torch.zeros(2, dtype=torch.float64, device=device) for name in (*measured, *self.distances)
        }
        self._counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)
        self._overlap = torch.zeros(2, labels, dtype=torch.int64, device=device)

    def add(self, inputs: Tensor, output: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Count a batch: inputs and output (B, C, H, W) as in stage1_vq.inputs, codes (B, h, w).

        Returns the figures of each picture, (B,) each.
        """
        if self.config.input == "segmentation":
            rows = self._compare_labels(output.argmax(1), inputs.argmax(1))
        else:
            rows = {"psnr": psnr(output, inputs)}
            if min(inputs.shape[2:]) >= WINDOW:
                rows["ssim"] = ssim(output, inputs)
            rows["l1"] = (output - inputs).abs().flatten(1).mean(1)
        rows |= {name: distance(output, inputs) for name, distance in self.distances.items()}
        self._counts += count_codes(codes, len(self._counts))
        for name, values in rows.items():
            self._sums[name][0] += values.double().sum()
            self._sums[name][1] += len(values)
        return rows

    def means(self) -> dict[str, float]:
        """The figures of all pictures of all processes. Raises UserError where there were none."""
        sums = sum_over_processes(torch.stack(list(self._sums.values()))).tolist()
        figures = {
            name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count
        }
        if not figures:
            raise UserError(
                "there are no validation pictures to evaluate on; give more data or a validation split"
            )
        if self.config.input == "segmentation":
            overlap = sum_over_processes(self._overlap)
            figures["mean_iou"] = float(mean_iou(overlap[0], overlap[1]))
        counts = sum_over_processes(self._counts)
        return figures | {"code_usage": float(usage(counts)), "perplexity": float(perplexity(counts))}

    def _compare_labels(self, found: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        both, either = overlap_counts(found, wanted, self.config.in_channels)
        self._overlap += torch.stack((both.sum(0), either.sum(0)))
        accuracy = (found == wanted).float().flatten(1).mean(1)
        return {"pixel_accuracy": accuracy, "mean_iou": mean_iou(both, either)}
