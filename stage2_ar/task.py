"""What a training step of stage two does: cross-entropy of each code, given a condition and those before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from stage1_vq import VQModel
from stage1_vq.inputs import as_picture, model_input, restored
from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.model import ARModel
from stage2_ar.pipeline import ARPipeline
from stage2_ar.sampling import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.transformer import code_log_likelihood, next_code_loss, weight_decay_groups
from taming.collective import mean_over_processes, sum_over_processes
from taming.data.label_colours import paint_labels
from taming.data.picture import tile
from taming.errors import UserError
from taming.training.ema import Ema
from taming.training.schedule import learning_rate, set_learning_rate
from taming.types import Batch


def model_config(config: ARTrainConfig, tokenizer: VQModel, size: tuple[int, int]) -> ARModelConfig:
    """The model that a training config means, for a tokenizer and pictures of `size` (H, W) pixels."""
    factor = tokenizer.spec.downsample_factor
    for name, pixels in zip(("height", "width"), size, strict=True):
        if pixels % factor:
            raise UserError(
                f"data.size: {name} {pixels} is not divisible by the tokenizer's downsample factor {factor}; "
                f"use {max(pixels // factor, 1) * factor}"
            )
    return ARModelConfig(
        transformer=config.transformer,
        condition=config.condition,
        vocabulary_size=tokenizer.spec.codebook_size,
        grid=(size[0] // factor, size[1] // factor),
        order=config.order,
        downsample_factor=factor,
        tokenizer_hash=tokenizer.codes_hash(),
    )


class ARTask:
    """Trains an ARModel on codes, or on pictures that are encoded on the way."""

    guard = None
    """Nothing here can ruin a run."""

    def __init__(self, config: ARTrainConfig, tokenizer: VQModel, size: tuple[int, int]) -> None:
        self.config = config
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.model = ARModel(model_config(config, tokenizer, size))
        decay = config.training.ema_decay
        self.ema = Ema(self.model, decay) if decay is not None else None

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes, build the optimiser."""
        self.accelerator, self.total_steps = accelerator, total_steps
        for module in (self.tokenizer, self.model, self.ema):
            if module is not None:
                module.to(accelerator.device)
        # A shell, since accelerate changes the forward of what it is given: the model stays as it is.
        self._loss: nn.Module = accelerator.prepare_model(_Loss(self.model))
        optimizer = self.config.optimizer
        self._optimizer = AdamW(
            weight_decay_groups(self.model, optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            fused=True,
        )

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update; returns the loss in nats and bits a code, equal on all processes.

        Raises UserError, before anything moves, where the loss is not finite.
        """
        self.model.train()
        set_learning_rate(self._optimizer, learning_rate(self.config.optimizer, step, self.total_steps))
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(micro_batches):
            codes = self._codes(batch)
            last = number == len(micro_batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self._loss):
                with self.accelerator.autocast():
                    loss = self._loss(codes, batch) / len(micro_batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        total = mean_over_processes(total)
        if not torch.isfinite(total):
            raise UserError(
                f"training diverged at step {step}: the loss is not finite; lower optimizer.learning_rate, "
                "set training.clip_norm, or use training.precision=fp32, and resume"
            )
        if self.config.training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.training.clip_norm)
        self._optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return {"loss": total, "bits_per_code": total / torch.log(torch.tensor(2.0))}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """loss (nats a code), bits_per_code and accuracy of the most probable code, over all pictures."""
        model = self._evaluated()
        sums = torch.zeros(3, dtype=torch.float64, device=self.accelerator.device)
        for batch in batches:
            codes = self._codes(batch)
            # In fp32, as the pipeline samples: a model that only works under autocast must not pass unseen.
            logits = model(codes, batch)
            flat = codes.flatten(1)
            sums[0] += flat.numel()
            sums[1] -= code_log_likelihood(logits, flat).sum()
            sums[2] += (logits.argmax(-1) == flat).sum()
        count, nats, right = sum_over_processes(sums).tolist()
        if not count:
            raise UserError(
                "there are no validation pictures to evaluate on; give more data or a validation split"
            )
        loss = nats / count
        return {"loss": loss, "bits_per_code": loss / 0.6931471805599453, "accuracy": right / count}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Rows of label maps (where there are any), pictures as the tokenizer paints them, and samples."""
        model, codes = self._evaluated(), self._codes(batch)
        grid = (codes.shape[1], codes.shape[2])
        prefix = model.condition({**batch, "codes": codes}, grid)
        uniforms = picture_uniforms(0, 0, len(codes), grid[0] * grid[1])
        sampled = sample_codes(model.transformer, prefix, None, grid, uniforms, SamplingSettings())
        config = self.tokenizer.config
        painted = [restored(self.tokenizer.decode(part), config) for part in (codes, sampled)]
        rows = [as_picture(part, config).cpu() for part in painted]
        if "segmentation" in batch and rows[0].shape[1] == 3:
            rows.insert(0, paint_labels(batch["segmentation"].cpu()))
        return tile(torch.cat(rows), columns=len(codes))

    def notes(self) -> list[str]:
        """Nothing that the figures do not tell."""
        return []

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        named = {"model": self.model, "ema": self.ema}
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimiser."""
        return {"model": self._optimizer}

    def save_model(self, folder: Path) -> None:
        """Write the pipeline: the averaged transformer where one is averaged, and its tokenizer."""
        ARPipeline(self._evaluated(), self.tokenizer).save_pretrained(folder)

    def _codes(self, batch: Batch) -> Tensor:
        """(B, h, w): stored ones, or the pictures' own. Always encoded in fp32, as the pipeline does."""
        if "codes" in batch:
            codes: Tensor = batch["codes"]
            return codes
        return self.tokenizer.encode(model_input(batch, self.tokenizer.config))

    def _evaluated(self) -> ARModel:
        model = self.model if self.ema is None else self.ema.module
        assert isinstance(model, ARModel)
        return model.eval()


class _Loss(nn.Module):
    """The model with its loss, as the wrapper for several processes sees it."""

    def __init__(self, model: ARModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor, batch: Batch) -> Tensor:
        return next_code_loss(self.model(codes, batch), codes.flatten(1))
