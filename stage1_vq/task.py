"""What a training step of stage one does.

One forward of the autoencoder serves both players. The graph is cut at the reconstruction: what the
reconstruction loss and the discriminator want of it is found as two gradients of the picture; they give the
adaptive weight through the last convolution alone, and their weighted sum goes back through decoder and
encoder once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from stage1_vq.config import AdversarialConfig, VQTrainConfig
from stage1_vq.loss import gradient_ratio, last_conv_gradient, reconstruction_loss
from stage1_vq.model import VQModel, VQOutput
from taming.collective import mean_over_processes, sum_over_processes
from taming.errors import UserError
from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.patchgan import PatchGAN
from taming.metrics.codebook import count_codes, perplexity, usage
from taming.metrics.lpips import PerceptualDistance
from taming.metrics.psnr import psnr
from taming.training.ema import Ema
from taming.training.schedule import learning_rate, set_learning_rate
from taming.types import Batch


class VQTask:
    """Trains a VQModel, with a discriminator where the config has one.

    `perceptual` replaces the distance that the config would load (benchmarks, tests).
    """

    def __init__(self, config: VQTrainConfig, *, perceptual: nn.Module | None = None) -> None:
        self.config = config
        self.model = VQModel(config.model)
        if config.init_from is not None:
            self._start_from(config.init_from)
        self.adversarial = config.discriminator
        self.discriminator: PatchGAN | None = None
        if self.adversarial is not None:
            self.discriminator = PatchGAN(self.adversarial.network, config.model.in_channels)
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
        for module in (self.model, self.discriminator, self.perceptual, self.ema):
            if module is not None:
                module.to(accelerator.device)
        # Shells, since accelerate changes the forward of what it is given: the models stay as they are.
        self._autoencoder: nn.Module = accelerator.prepare_model(_Whole(self.model))
        self._autoencoder_optimizer = _adam(self.model, self.config)
        if self.discriminator is not None:
            self._both: nn.Module = accelerator.prepare_model(_RealAndFake(self.discriminator))
            self._discriminator_optimizer = _adam(self.discriminator, self.config)

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of both players; returns detached () values, equal on all processes.

        Raises UserError, before anything moves, where a term is not finite.
        """
        self.model.train()
        rate = learning_rate(self.config.optimizer, step, self.total_steps)
        set_learning_rate(self._autoencoder_optimizer, rate)
        adversarial = self.adversarial if self._plays(step) else None
        self._autoencoder_optimizer.zero_grad(set_to_none=True)
        if adversarial is not None:
            set_learning_rate(self._discriminator_optimizer, rate * adversarial.learning_rate_ratio)
            self._discriminator_optimizer.zero_grad(set_to_none=True)

        logs: dict[str, Tensor] = {}
        share = 1 / len(micro_batches)
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            for name, value in self._accumulate(batch["image"], step, share, last, adversarial).items():
                logs[name] = logs.get(name, 0) + share * value
        values = mean_over_processes(torch.stack([value.float() for value in logs.values()]))
        logs = dict(zip(logs, values.unbind(), strict=True))
        self._check_finite(logs, step)

        self._clip(self.model)
        self._autoencoder_optimizer.step()
        self.model.quantize.after_step()
        if adversarial is not None:
            assert self.discriminator is not None
            self._clip(self.discriminator)
            self._discriminator_optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return logs

    def _accumulate(
        self, images: Tensor, step: int, share: float, last: bool, adversarial: AdversarialConfig | None
    ) -> dict[str, Tensor]:
        """Gradients of one micro-batch for both players, times `share`."""
        with self._reduced_if(last, self._autoencoder):
            with self.accelerator.autocast():
                output: VQOutput = self._autoencoder(images)
            logs, gradient = self._judge(output, images, step, adversarial)
            # The surrogate's gradient at the picture is exactly `gradient`.
            surrogate = (output.reconstruction * gradient.to(output.reconstruction.dtype)).sum()
            self.accelerator.backward(share * (surrogate + output.quantizer.loss))
        if adversarial is not None:
            fake = output.reconstruction.detach()
            del output, surrogate
            logs |= self._teach_discriminator(images, fake, share, last, adversarial)
        return logs

    def _judge(
        self, output: VQOutput, images: Tensor, step: int, adversarial: AdversarialConfig | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(log, gradient (B, C, H, W) that the reconstruction is to follow)."""
        picture = output.reconstruction.detach().float().requires_grad_()
        with self.accelerator.autocast():
            loss = reconstruction_loss(picture, images, self.config.loss, self.perceptual)
        (gradient,) = torch.autograd.grad(loss.total, picture)
        logs = {"nll": loss.total.detach(), **loss.terms, "codebook": output.quantizer.loss.detach()}
        if adversarial is not None and (factor := adversarial.factor(step)):
            assert self.discriminator is not None
            # Unwrapped and without weight gradients: this pass judges, it does not learn.
            with _frozen(self.discriminator), self.accelerator.autocast():
                g_loss = generator_loss(self.discriminator(picture).float())
            (g_gradient,) = torch.autograd.grad(g_loss, picture)
            weight = torch.ones_like(g_loss)
            if adversarial.weight_mode == "adaptive":
                weight = gradient_ratio(
                    *(
                        last_conv_gradient(output.features, self.model.decoder.conv_out, g)
                        for g in (gradient, g_gradient)
                    )
                )
            weight = weight * adversarial.weight
            gradient = gradient + factor * weight * g_gradient
            logs |= {"adversarial": g_loss.detach(), "adaptive_weight": weight}
        logs |= {name: value for name, value in output.quantizer.terms.items() if name not in logs}
        counts = count_codes(output.quantizer.indices, self.model.quantize.codebook_size)
        logs |= {"code_usage": usage(counts), "perplexity": perplexity(counts)}
        return logs, gradient

    def _teach_discriminator(
        self, real: Tensor, fake: Tensor, share: float, last: bool, adversarial: AdversarialConfig
    ) -> dict[str, Tensor]:
        with self._reduced_if(last, self._both):
            with self.accelerator.autocast():
                logits_real, logits_fake = self._both(real, fake)
            logits_real, logits_fake = logits_real.float(), logits_fake.float()
            loss = discriminator_loss(logits_real, logits_fake, adversarial.loss)
            self.accelerator.backward(share * loss)
        return {
            "discriminator": loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """psnr, l1, code_usage and perplexity over all pictures and, where it is trained on, perceptual."""
        model = self._evaluated()
        device = self.accelerator.device
        counts = torch.zeros(model.quantize.codebook_size, dtype=torch.int64, device=device)
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for batch in batches:
            images = batch["image"]
            output = model(images)
            reconstruction = output.reconstruction.float().clamp(-1, 1)
            counts += count_codes(output.quantizer.indices, len(counts))
            perceptual = self.perceptual(reconstruction, images) if self.perceptual is not None else 0.0
            sums[0] += len(images)
            sums[1] += psnr(reconstruction, images).sum()
            sums[2] += (reconstruction - images).abs().flatten(1).mean(1).sum()
            sums[3] += perceptual * len(images)
        counts, sums = sum_over_processes(counts), sum_over_processes(sums)
        pictures, total_psnr, total_l1, total_perceptual = sums.tolist()
        if not pictures:
            raise UserError(
                "there are no validation pictures to evaluate on; give more data or a validation split"
            )
        figures = {
            "psnr": total_psnr / pictures,
            "l1": total_l1 / pictures,
            "code_usage": float(usage(counts)),
            "perplexity": float(perplexity(counts)),
        }
        if self.perceptual is not None:
            figures["perceptual"] = total_perceptual / pictures
        return figures

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Inputs over their reconstructions, (C, H, W) in [-1, 1]."""
        from taming.data.picture import tile

        images = batch["image"]
        rows = torch.cat((images, self._evaluated()(images).reconstruction.float().clamp(-1, 1)))
        return tile(rows.cpu(), columns=len(images))

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        named = {"model": self.model, "discriminator": self.discriminator, "ema": self.ema}
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers of the players."""
        optimizers: dict[str, Optimizer] = {"model": self._autoencoder_optimizer}
        if self.discriminator is not None:
            optimizers["discriminator"] = self._discriminator_optimizer
        return optimizers

    def save_model(self, folder: Path) -> None:
        """Write the averaged model, or the model itself where none is averaged."""
        self._evaluated().save_pretrained(folder)

    def _evaluated(self) -> VQModel:
        model = self.model if self.ema is None else self.ema.module
        assert isinstance(model, VQModel)
        return model.eval()

    def _plays(self, step: int) -> bool:
        return self.adversarial is not None and step >= self.adversarial.start_step

    def _reduced_if(self, last: bool, model: nn.Module) -> AbstractContextManager[None]:
        """Processes exchange gradients with the last micro-batch only."""
        if last:
            return nullcontext()
        unreduced: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return unreduced

    def _clip(self, model: nn.Module) -> None:
        # Each player on its own: a wild discriminator must not hold the decoder back.
        if self.config.training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.training.clip_norm)

    def _check_finite(self, logs: dict[str, Tensor], step: int) -> None:
        if torch.isfinite(torch.stack(list(logs.values()))).all():
            return
        names = [name for name, value in logs.items() if not torch.isfinite(value)]
        raise UserError(
            f"training diverged at step {step}: {', '.join(names)} is not finite; lower "
            "optimizer.learning_rate, set training.clip_norm, or use training.precision=fp32, and resume"
        )

    def _start_from(self, source: str) -> None:
        start = VQModel.from_pretrained(source)
        if start.config.model_copy(update={"recompute": self.config.model.recompute}) != self.config.model:
            raise UserError(
                f"init_from {source} has another model config than this run; copy its config to model"
            )
        self.model.load_state_dict(start.state_dict())


class _Whole(nn.Module):
    """The autoencoder as the wrapper for several processes sees it."""

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> VQOutput:
        output: VQOutput = self.model(images)
        return output


class _RealAndFake(nn.Module):
    """Both batches in one forward, as DDP wants it, each with its own batch statistics, as published."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but not into its weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _adam(model: nn.Module, config: VQTrainConfig) -> AdamW:
    optimizer = config.optimizer
    return AdamW(
        model.parameters(),
        lr=optimizer.learning_rate,
        betas=optimizer.betas,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
