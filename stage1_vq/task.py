"""What a training step of stage one does.

One forward of the autoencoder serves both players. The graph is cut at the reconstruction: what the
reconstruction loss and the discriminator want of it is found as two gradients of the picture; they give the
adaptive weight through the last convolution alone, and their weighted sum goes back through decoder and
encoder once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_vq.adversary import Adversary
from stage1_vq.codebook_alarm import CodebookAlarm, remedies
from stage1_vq.config import VQTrainConfig
from stage1_vq.evaluate import reconstruct
from stage1_vq.figures import Distance, ReconstructionFigures
from stage1_vq.fine_tuning import hold_codes, start_from, train_decoder_only
from stage1_vq.inputs import as_picture, model_input
from stage1_vq.loss import blind_error, reconstruction_loss
from stage1_vq.model import VQModel, VQOutput
from stage1_vq.optimizers import adam, autoencoder_optimizers
from taming.collective import mean_over_processes
from taming.errors import UserError
from taming.metrics.codebook import count_codes, perplexity, usage
from taming.metrics.lpips import PerceptualDistance
from taming.training.distributed import reduced_if
from taming.training.ema import Ema
from taming.training.guard import CollapseGuard
from taming.training.schedule import learning_rate, set_learning_rate
from taming.types import Batch


class VQTask:
    """Trains a VQModel, with a discriminator where the config has one.

    `perceptual` replaces the distance that the config would load (benchmarks, tests).
    """

    def __init__(self, config: VQTrainConfig, *, perceptual: nn.Module | None = None) -> None:
        self.config = config
        self._notes: list[str] = []
        self.model = VQModel(config.model)
        if config.init_from is not None:
            start_from(self.model, config.init_from)
        if config.train_only == "decoder":
            hold_codes(self.model)
        self.alarm: CodebookAlarm | None = None
        if config.codebook_alarm is not None and config.train_only is None:
            quantizer = config.model.quantizer
            self.alarm = CodebookAlarm(
                config.codebook_alarm, self.model.quantize.codebook_size, remedies(quantizer)
            )
        self.adversary: Adversary | None = None
        if config.discriminator is not None:
            self.adversary = Adversary(config.discriminator, config.model.in_channels, self._notes)
            if config.init_from is not None:
                self.adversary.start_from(config.init_from)
        self.perceptual = perceptual
        if self.perceptual is None and config.loss.perceptual_weight:
            if config.model.in_channels not in (1, 3):
                raise UserError(
                    f"the perceptual loss looks at 1 or 3 channels, not {config.model.in_channels}; "
                    "set loss.perceptual_weight=0"
                )
            self.perceptual = PerceptualDistance(
                config.loss.vgg_weights, follow_autocast=config.loss.perceptual_precision == "run"
            )
        decay = config.training.ema_decay
        self.ema = Ema(self.model, decay) if decay is not None else None

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes, build the optimisers."""
        self.accelerator, self.total_steps = accelerator, total_steps
        for module in (self.model, self.perceptual, self.ema, self.alarm):
            if module is not None:
                module.to(accelerator.device)
        # Shells, since accelerate changes the forward of what it is given: the models stay as they are.
        self._autoencoder: nn.Module = accelerator.prepare_model(_Whole(self.model))
        self._optimizers = autoencoder_optimizers(self.model, self.config.optimizer)
        if self.adversary is not None:
            self.adversary.prepare(accelerator, partial(adam, config=self.config.optimizer))

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of both players; returns detached () values, equal on all processes.

        Where a term is not finite nothing moves: the guard's `collapse` says so if it can go back; else
        UserError is raised.
        """
        if self.config.train_only == "decoder":
            train_decoder_only(self.model)
        else:
            self.model.train()
            self.model.quantize.before_step(step, self.total_steps)
        rate = learning_rate(self.config.optimizer, step, self.total_steps)
        for optimizer in self._optimizers.values():
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        adversary = self.adversary if self.adversary is not None and self.adversary.plays(step) else None
        if adversary is not None:
            adversary.begin_step(rate)

        logs: dict[str, Tensor] = {}
        share = 1 / len(micro_batches)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            inputs = model_input(batch, self.config.model)
            for name, value in self._accumulate(inputs, step, share, last, adversary).items():
                logs[name] = logs.get(name, 0) + share * value
        values = mean_over_processes(torch.stack([value.float() for value in logs.values()]))
        logs = dict(zip(logs, values.unbind(), strict=True))
        # The step's only wait for the device.
        read = dict(zip(logs, values.tolist(), strict=True))
        logs.pop("blind", None)
        if not self._check_finite(read, step):
            return logs

        self._clip(self.model)
        for optimizer in self._optimizers.values():
            optimizer.step()
        if self.config.train_only is None:
            self.model.quantize.after_step()
        if adversary is not None:
            self._clip(adversary.discriminator)
            adversary.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        if self.adversary is not None:
            self.adversary.end_step(step, logs, read, last=step + 1 == self.total_steps)
        if self.alarm is not None and (warning := self.alarm.observe()):
            self._notes.append(warning)
        return logs

    def _accumulate(
        self, images: Tensor, step: int, share: float, last: bool, adversary: Adversary | None
    ) -> dict[str, Tensor]:
        """Gradients of one micro-batch for both players, times `share`."""
        with reduced_if(last, self.accelerator, self._autoencoder):
            with self.accelerator.autocast():
                output: VQOutput = self._autoencoder(images)
            logs, gradient = self._judge(output, images, step, adversary)
            # The surrogate's gradient at the picture is exactly `gradient`.
            surrogate = (output.reconstruction * gradient.to(output.reconstruction.dtype)).sum()
            self.accelerator.backward(share * (surrogate + output.quantizer.loss))
        if adversary is not None:
            fake = output.reconstruction.detach()
            del output, surrogate
            logs |= adversary.teach(images, fake, step, share, last=last)
        return logs

    def _judge(
        self, output: VQOutput, images: Tensor, step: int, adversary: Adversary | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(log, gradient (B, C, H, W) that the reconstruction is to follow)."""
        picture = output.reconstruction.detach().float().requires_grad_()
        with self.accelerator.autocast():
            loss = reconstruction_loss(picture, images, self.config.loss, self.perceptual)
        (gradient,) = torch.autograd.grad(loss.total, picture)
        logs = {"nll": loss.total.detach(), **loss.terms, "codebook": output.quantizer.loss.detach()}
        if self.guard is not None and self.guard.wants_blind:
            logs["blind"] = blind_error(images, self.config.loss)
        if adversary is not None:
            adversary.begin_micro_batch(images)
            last_conv = self.model.decoder.conv_out
            wish, judgement = adversary.judge(picture, gradient, output.features, last_conv, step)
            gradient = gradient if wish is None else gradient + wish
            logs |= judgement
        logs |= {name: value for name, value in output.quantizer.terms.items() if name not in logs}
        counts = count_codes(output.quantizer.indices, self.model.quantize.codebook_size)
        logs |= {"code_usage": usage(counts), "perplexity": perplexity(counts)}
        if self.alarm is not None:
            self.alarm.count(counts)
        return logs, gradient

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The figures of `taming vq eval` over all pictures, and perceptual where it is trained on."""
        model = self._evaluated()
        perceptual = self.perceptual
        distances: dict[str, Distance] = {}
        if perceptual is not None:
            distances["perceptual"] = lambda found, wanted: perceptual(found, wanted).expand(len(found))
        figures = ReconstructionFigures(
            self.config.model, model.quantize.codebook_size, self.accelerator.device, distances
        )
        for batch in batches:
            inputs = model_input(batch, self.config.model)
            codes, found = reconstruct(model, inputs)
            figures.add(inputs, found, codes)
        return figures.means()

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Inputs over their reconstructions, (1 or 3, H, W) in [-1, 1]."""
        from taming.data.picture import tile

        inputs = model_input(batch, self.config.model)
        _, found = reconstruct(self._evaluated(), inputs)
        rows = [as_picture(values, self.config.model).cpu() for values in (inputs, found)]
        return tile(torch.cat(rows), columns=len(inputs))

    @property
    def guard(self) -> CollapseGuard | None:
        """What watches the adversarial term, for the loop that goes back."""
        return self.adversary.guard if self.adversary is not None else None

    def notes(self) -> list[str]:
        """What the user should be told, since the last call."""
        taken, self._notes[:] = list(self._notes), []
        return taken

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        named: dict[str, nn.Module | None] = {"model": self.model, "ema": self.ema}
        if self.adversary is not None:
            named["discriminator"] = self.adversary.discriminator
            named["adversary"] = self.adversary.state
        named["codebook_alarm"] = self.alarm
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers of the players."""
        optimizers = dict(self._optimizers)
        if self.adversary is not None:
            optimizers["discriminator"] = self.adversary.optimizer
        return optimizers

    def save_model(self, folder: Path) -> None:
        """Write the averaged model, or the model itself where none is averaged, and the discriminator."""
        self._evaluated().save_pretrained(folder)
        if self.adversary is not None:
            self.adversary.save(folder)

    def _evaluated(self) -> VQModel:
        model = self.model if self.ema is None else self.ema.module
        assert isinstance(model, VQModel)
        return model.eval()

    def _clip(self, model: nn.Module) -> None:
        # Each player on its own: a wild discriminator must not hold the decoder back.
        if self.config.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.training.clip_norm)

    def _check_finite(self, values: dict[str, float], step: int) -> bool:
        """Whether the step can be made. Raises UserError where it cannot, and going back cannot help."""
        names = [name for name, value in values.items() if not math.isfinite(value)]
        if not names:
            return True
        what = f"{', '.join(names)} is not finite"
        if self.guard is not None and self.guard.active and self.guard.counts(step):
            self.guard.collapse = what
            return False
        raise UserError(
            f"training diverged at step {step}: {what}; lower "
            "optimizer.learning_rate, set training.clip_norm, or use training.precision=fp32, and resume"
        )


class _Whole(nn.Module):
    """The autoencoder as the wrapper for several processes sees it."""

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> VQOutput:
        output: VQOutput = self.model(images)
        return output
