"""What a training step of stage one does: both players' gradients (`passes.py`), then, if all is finite, the
updates."""

from __future__ import annotations

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
from stage1_vq.model import VQModel, VQOutput
from stage1_vq.optimizers import autoencoder_optimizers
from stage1_vq.passes import Passes
from stage1_vq.quantizers.health import FirstLatents
from taming.errors import UserError
from taming.gan.forward_state import ForwardState
from taming.metrics.codebook import perplexity, usage
from taming.metrics.lpips import PerceptualDistance
from taming.training.adam import adam
from taming.training.ema import Ema
from taming.training.finite import NonFiniteSteps, StepValues, exchange
from taming.training.gradients import OwnGradients, clip_gradients, gradient_norm
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
        self._decoder_is_trained = False
        if config.init_from is not None:
            note = start_from(self.model, config.init_from, another_decoder=config.train_only == "decoder")
            self._decoder_is_trained = note is None
            if note is not None:
                self._notes.append(note)
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
            self.adversary = Adversary(
                config.discriminator, config.model.in_channels, config.data.height_width, self._notes
            )
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
        self.nonfinite = NonFiniteSteps(config.training.on_nonfinite)

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes, build the optimisers."""
        self.accelerator, self.total_steps = accelerator, total_steps
        for module in (self.model, self.perceptual, self.ema, self.alarm):
            if module is not None:
                module.to(accelerator.device)
        # Shells, since accelerate changes the forward of what it is given: the models stay as they are.
        autoencoder: nn.Module = accelerator.prepare_model(_Whole(self.model))
        self._own_gradients = OwnGradients(autoencoder)
        self.passes = Passes(self.config, accelerator, self.model, autoencoder, self.perceptual)
        self._optimizers = autoencoder_optimizers(self.model, self.config.optimizer)
        if self.adversary is not None:
            self.adversary.prepare(accelerator, partial(adam, config=self.config.optimizer))

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of both players; returns detached () values, equal on all processes.

        Where a term or a gradient is not finite, on any process, nothing moves and nothing is returned: the
        guard's `collapse` says so if it can go back; the step is left out where the config says so; else
        UserError is raised.
        """
        if self.config.train_only == "decoder":
            train_decoder_only(self.model)
        else:
            self.model.train()
            self.model.quantize.before_step(step, self.total_steps)
        # What a decoder begins with and then leaves behind, one that was trained has left behind.
        progress = 1.0 if self._decoder_is_trained else step / self.total_steps
        for model in (self.model, self.ema.module) if self.ema is not None else (self.model,):
            assert isinstance(model, VQModel)
            model.decoder.before_step(progress)
        self._before = ForwardState(self.model.decoder)
        rate = learning_rate(self.config.optimizer, step, self.total_steps)
        for optimizer in self._optimizers.values():
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad(set_to_none=True)
        adversary = self.adversary if self.adversary is not None and self.adversary.plays(step) else None
        if adversary is not None:
            adversary.begin_step(rate)

        inputs = [model_input(batch, self.config.model) for batch in micro_batches]
        blind = self.guard is not None and self.guard.wants_blind
        seen = self.passes.gradients(inputs, step, adversary, blind=blind)
        players: dict[str, nn.Module] = {"model": self.model}
        own = {"model": self._own_gradients.take()}
        if adversary is not None:
            players["discriminator"] = adversary.discriminator
            own["discriminator"] = adversary.critic.own_gradients.take()
        norms = {name: gradient_norm(player.parameters()) for name, player in players.items()}
        known = {name: total for name, total in own.items() if total is not None}
        values = exchange(seen.logs, norms, known, seen.counts)
        if values.wrong is not None:
            self._leave_out(step, values.wrong, adversary)
            return {}
        self.nonfinite.made()

        for name, player in players.items():
            # Each player on its own: a wild discriminator must not hold the decoder back.
            clip_gradients(player.parameters(), norms[name], self.config.training.clip_norm)
        for optimizer in self._optimizers.values():
            optimizer.step()
        if self.config.train_only is None:
            self.model.quantize.after_step()
        if adversary is not None:
            adversary.critic.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return self._end_step(step, values, norms)

    def _end_step(self, step: int, values: StepValues, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """After the update: what watches it, and the log."""
        logs = values.means
        if self.adversary is not None:
            self.adversary.end_step(step, logs, values.read, last=step + 1 == self.total_steps)
        logs.pop("blind", None)
        assert values.counts is not None
        logs |= {"code_usage": usage(values.counts), "perplexity": perplexity(values.counts)}
        logs |= {f"gradient_{name}": norm.float() for name, norm in norms.items()}
        if self.alarm is not None:
            self.alarm.count(values.counts)
            if warning := self.alarm.observe():
                self._notes.append(warning)
        return logs

    def _leave_out(self, step: int, wrong: str, adversary: Adversary | None) -> None:
        """Take back what the step's forward did; decide how the run goes on."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self.model.quantize.forget_step()
        self._before.restore()
        if adversary is not None:
            adversary.critic.undo_step()
        guard = self.guard
        can_go_back = guard is not None and guard.active and guard.counts(step)
        if guard is not None and can_go_back and self.nonfinite.policy == "stop":
            guard.collapse = f"{wrong} is not finite"
            return
        if note := self.nonfinite.refuse(step, wrong):
            self._notes.append(note)

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
        named["nonfinite"] = self.nonfinite
        if getattr(self.config.model.quantizer, "kmeans_init", False):
            named["first_latents"] = FirstLatents(self.model.quantize)
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers of the players."""
        optimizers = dict(self._optimizers)
        if self.adversary is not None:
            optimizers["discriminator"] = self.adversary.critic.optimizer
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


class _Whole(nn.Module):
    """The autoencoder as the wrapper for several processes sees it."""

    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> VQOutput:
        output: VQOutput = self.model(images)
        return output
