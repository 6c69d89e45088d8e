"""What a training step of stage two does: cross-entropy of each code, given a condition and those before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_vq import VQModel
from stage1_vq.inputs import as_picture, restored
from stage2_ar.best_model import BestModel
from stage2_ar.chance import sample_uniforms
from stage2_ar.codes import codes_of
from stage2_ar.conditions.tokenizers import attach_named, without_paths
from stage2_ar.config import ARModelConfig, ARTrainConfig
from stage2_ar.fine_tuning import hold_transformer, start_from
from stage2_ar.memorisation import FixedSample, MemorisationWatch
from stage2_ar.model import ARModel
from stage2_ar.optimizers import transformer_optimizers
from stage2_ar.pipeline import ARPipeline
from stage2_ar.random_order import random_share, sample_orders
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms, sample_codes
from stage2_ar.sharded import shard_model, whole_states
from stage2_ar.shown import condition_rows
from stage2_ar.transformer import code_log_likelihood, next_code_loss
from taming.collective import sum_over_processes
from taming.data.batch import to_device
from taming.data.loader import evaluation_batches
from taming.data.picture import tile
from taming.errors import UserError
from taming.training.distributed import reduced_if
from taming.training.ema import Ema
from taming.training.finite import NonFiniteSteps, exchange
from taming.training.gradients import OwnGradients, clip_gradients, gradient_norm
from taming.training.schedule import learning_rate, set_learning_rate
from taming.training.sharded import WholeCopy
from taming.training.sharding import Sharding, read_sharding
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
        condition=without_paths(config.condition),
        vocabulary_size=tokenizer.spec.codebook_size,
        grid=(size[0] // factor, size[1] // factor),
        order=config.order,
        downsample_factor=factor,
        tokenizer_hash=tokenizer.codes_hash(),
        any_order=config.random_order is not None and config.random_order.final_share > 0,
    )


class ARTask:
    """Trains an ARModel on codes, or on pictures that are encoded on the way.

    `probe` are training pictures whose bits are measured beside those of held-out ones.
    """

    guard = None
    """Nothing here can ruin a run."""

    def __init__(
        self,
        config: ARTrainConfig,
        tokenizer: VQModel,
        size: tuple[int, int],
        *,
        probe: FixedSample | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.model = ARModel(model_config(config, tokenizer, size))
        attach_named(self.model.condition, config.condition)
        self._notes: list[str] = []
        self._start_note: str | None = None
        if config.init_from is not None:
            anew = start_from(self.model, config.init_from)
            self._start_note = f"started from {config.init_from}; new: {', '.join(anew) or 'nothing'}"
        if config.train_only == "condition":
            hold_transformer(self.model)
        decay = config.training.ema_decay
        self.ema = Ema(self.model, decay) if decay is not None else None
        self.best = BestModel(self.model) if config.keep == "best" else None
        self.probe = probe
        self.watch: MemorisationWatch | None = None
        if probe is not None and config.memorisation is not None:
            self.watch = MemorisationWatch(config.memorisation)
        self.nonfinite = NonFiniteSteps(config.training.on_nonfinite)
        self.whole: WholeCopy | None = None
        """Where the weights are sharded: those that are evaluated, in one piece."""
        self._step = 0

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes or shard, build the optimisers."""
        self.accelerator, self.total_steps = accelerator, total_steps
        sharding = read_sharding()
        if sharding is not None and accelerator.num_processes > 1:
            self._shard(sharding)
            return
        for module in (self.tokenizer, self.model, self.ema):
            if module is not None:
                module.to(accelerator.device)
        # After the averaged copy was made: that one is only evaluated and sampled from.
        self.model.transformer.recompute = self.config.recompute
        if self.config.compile:
            self.model.transformer.compile_blocks()
        # A shell, since accelerate changes the forward of what it is given: the model stays as it is.
        shell = _Loss(self.model, self.config.pkeep, self.config.label_smoothing)
        self._loss: nn.Module = accelerator.prepare_model(shell)
        self._own_gradients = OwnGradients(self._loss)
        self._optimizers = transformer_optimizers(self.model, self.config.optimizer)

    def _shard(self, sharding: Sharding) -> None:
        """`prepare` with weights, averages and optimiser states spread over all processes."""
        self.tokenizer.to(self.accelerator.device)
        self.model.transformer.recompute = self.config.recompute or sharding.recompute
        self._loss = _Loss(self.model, self.config.pkeep, self.config.label_smoothing)
        self.whole = shard_model(
            self._loss, self.model, self.ema, sharding, self.accelerator, compiled=self.config.compile
        )
        self._own_gradients = OwnGradients(self._loss)
        self._optimizers = transformer_optimizers(self.model, self.config.optimizer)
        whole_states(self._optimizers.values())

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update; returns the loss in nats (with smoothing) and bits a code, equal on all processes.

        Where the loss or a gradient is not finite, on any process, nothing moves and nothing is returned:
        the step is left out where the config says so, else UserError is raised.
        """
        if step == 0 and self._start_note is not None:
            self._notes.append(self._start_note)
        self.model.train()
        if self.config.train_only == "condition":
            self.model.transformer.eval()
        rate = learning_rate(self.config.optimizer, step, self.total_steps)
        for optimizer in self._optimizers.values():
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, device=self.accelerator.device)
        for number, batch in enumerate(micro_batches):
            codes = self._codes(batch)
            order = self._random_orders(codes, batch, step)
            if "key" in batch:
                batch = {**batch, "chance": (self.config.training.seed, step)}
            with reduced_if(number == len(micro_batches) - 1, self.accelerator, self._loss):
                with self.accelerator.autocast():
                    values = self._loss(codes, batch, order) / len(micro_batches)
                self.accelerator.backward(values[0])
            sums += values.detach()
        own, norm = self._own_gradients.take(), gradient_norm(self.model.parameters())
        losses = {"loss": sums[0], "bits_per_code": sums[1] / math.log(2)}
        told = exchange(losses, {"model": norm}, {} if own is None else {"model": own})
        if told.wrong is not None:
            for optimizer in self._optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            if note := self.nonfinite.refuse(step, told.wrong):
                self._notes.append(note)
            return {}
        self.nonfinite.made()
        clip_gradients(self.model.parameters(), norm, self.config.training.clip_norm)
        for optimizer in self._optimizers.values():
            optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self._step = step + 1
        if self.whole is not None and self._preview_follows():
            self.whole.take(self._averaged())
        return {**told.means, "gradient_model": told.norms["model"]}

    def _random_orders(self, codes: Tensor, batch: Batch, step: int) -> Tensor | None:
        """Orders (B, h * w) of the samples where some are random in this step."""
        if self.config.random_order is None:
            return None
        share = random_share(self.config.random_order, step, self.total_steps)
        own = self.model.transformer.sequence_cells((codes.shape[1], codes.shape[2]), codes.device)
        return sample_orders(own, share, self.config.training.seed, step, batch["key"])

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """loss (nats a code), bits_per_code and accuracy of the most probable code, over all pictures.

        With a probe also train_bits_per_code; where the best weights are kept, best_bits_per_code and their
        best_step. In the model's own order.
        """
        if self.whole is None:
            return self._evaluate(batches)
        with self.whole.everywhere(self._averaged()):
            return self._evaluate(batches)

    def _evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        model = self._evaluated()
        loss, accuracy = self._measure(model, batches)
        figures = {"loss": loss, "bits_per_code": loss / math.log(2), "accuracy": accuracy}
        if self.watch is not None and self.probe is not None:
            figures["train_bits_per_code"] = self._measure(model, self._probe_batches())[0] / math.log(2)
            warning = self.watch.observe(figures["train_bits_per_code"], figures["bits_per_code"])
            if warning is not None:
                self._notes.append(warning)
        if self.best is not None:
            # Without a step made here the run was resumed at its end.
            self.best.offer(model, loss, self._step or self.total_steps)
            figures["best_bits_per_code"] = self.best.loss / math.log(2)
            figures["best_step"] = self.best.step
        return figures

    def _measure(self, model: ARModel, batches: Iterable[Batch]) -> tuple[float, float]:
        """(nats a code, accuracy) over this and all other processes' batches."""
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
        return nats / count, right / count

    def _probe_batches(self) -> Iterator[Batch]:
        assert self.probe is not None
        training = self.config.training
        batches = evaluation_batches(
            self.probe,
            batch_size=max(training.batch_size // training.accumulation, 1),
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            workers=training.workers,
        )
        return (to_device(batch, self.accelerator.device) for batch in batches)

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """A row of each condition that is a picture, pictures as the tokenizer paints them, and samples."""
        if self.whole is None:
            return self._preview(batch)
        with self.whole.on_device():
            return self._preview(batch)

    def _preview(self, batch: Batch) -> Tensor:
        model, codes = self._evaluated(), self._codes(batch)
        grid = (codes.shape[1], codes.shape[2])
        prefix = model.condition({**batch, "codes": codes}, grid)
        uniforms = picture_uniforms(0, 0, len(codes), grid[0] * grid[1])
        sampled = sample_codes(model.transformer, prefix, None, grid, uniforms, SamplingSettings())
        config = self.tokenizer.config
        painted = [restored(self.tokenizer.decode(part), config) for part in (codes, sampled)]
        rows = [as_picture(part, config).cpu().expand(-1, 3, -1, -1) for part in painted]
        asked = condition_rows(model.condition, batch, (rows[0].shape[2], rows[0].shape[3]))
        return tile(torch.cat([*asked, *rows]), columns=len(codes))

    def notes(self) -> list[str]:
        """What the user should be told, since the last call."""
        taken, self._notes = self._notes, []
        return taken

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        named: dict[str, nn.Module | None] = {"model": self.model, "ema": self.ema}
        named |= {"best": self.best, "memorisation": self.watch, "nonfinite": self.nonfinite}
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers by name."""
        return self._optimizers

    def save_model(self, folder: Path) -> None:
        """Write the pipeline: the transformer as it is evaluated, or was at its best, and its tokenizer."""
        model = self._evaluated()
        if self.best is not None and self.best.step:
            model = self.best.model
        ARPipeline(model, self.tokenizer).save_pretrained(folder)

    def _codes(self, batch: Batch) -> Tensor:
        """(B, h, w): stored ones, or the pictures' own. Always encoded in fp32, as the pipeline does."""
        return codes_of(self.tokenizer, batch)

    def _evaluated(self) -> ARModel:
        """What is evaluated, sampled from and saved."""
        model = self._averaged() if self.whole is None else self.whole.module
        assert isinstance(model, ARModel)
        return model.eval()

    def _averaged(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    def _preview_follows(self) -> bool:
        """Whether the loop draws a preview after this step, which the main process does alone."""
        return self._step % self.config.training.preview_every == 0 or self._step == self.total_steps


class _Loss(nn.Module):
    """The model with its loss, as the wrapper for several processes sees it."""

    def __init__(self, model: ARModel, pkeep: float, smoothing: float) -> None:
        super().__init__()
        self.model, self.pkeep, self.smoothing = model, pkeep, smoothing

    def forward(self, codes: Tensor, batch: Batch, order: Tensor | None = None) -> Tensor:
        """(2,): what is minimised, and the cross-entropy alone; nats a code."""
        inputs = disturbed(codes, self.pkeep, self.model.config.vocabulary_size, batch)
        logits = self.model(inputs, batch, order)
        flat = codes.flatten(1)
        loss = next_code_loss(logits, flat, smoothing=self.smoothing)
        with torch.no_grad():
            plain = next_code_loss(logits, flat) if self.smoothing else loss
        return torch.stack((loss, plain))


def disturbed(codes: Tensor, pkeep: float, vocabulary_size: int, batch: Batch) -> Tensor:
    """Codes (B, h, w) of which each is kept with the probability `pkeep`, else drawn from all; they stay as
    they are at 1. The draws follow from `chance` where the batch has one, else from torch's generator."""
    if pkeep == 1:
        return codes
    if "chance" not in batch:
        draws = torch.rand(2, *codes.shape, device=codes.device)
    else:
        seed, step = batch["chance"]
        rows = sample_uniforms(seed, step, batch["key"], "pkeep", 2 * codes[0].numel())
        draws = rows.view(len(codes), 2, *codes.shape[1:]).transpose(0, 1).to(codes.device)
    return torch.where(draws[0] < pkeep, codes, (draws[1] * vocabulary_size).long())
