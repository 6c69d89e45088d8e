"""What a training step of a GAN does: the discriminator's update, and every so often the generator's.

As published, the discriminator learns first, from pictures that the generator paints without a gradient and
without a trace in its own statistics; then the generator learns, from other noise, what the discriminator
that has just learned wants. Each player's update is made, or left out where it is not finite, by itself.

Axes: B pictures of a micro-batch, C channels, H W pixels, Z noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from taming.errors import ConfigError
from taming.gan.augment import draw_view
from taming.gan.config import GANTrainConfig
from taming.gan.critic import PAINTER, Critic
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.saved import save_discriminator
from taming.gan.forward_state import ForwardState, unchanged
from taming.gan.generator import Generator
from taming.gan.model import GANModel, GANModelConfig
from taming.gan.noise import draw_noise
from taming.gan.sample import paint
from taming.layers.spectral_norm import Directions
from taming.metrics.feature_distance import FeatureDistance
from taming.training.adam import adam
from taming.training.distributed import reduced_if
from taming.training.ema import Ema
from taming.training.finite import NonFiniteSteps, StepValues, exchange
from taming.training.gradients import OwnGradients, clip_gradients, gradient_norm
from taming.training.guard import CollapseGuard
from taming.training.schedule import learning_rate, set_learning_rate
from taming.types import Batch

WHOLE_SUM = 2.0
"""A GAN by itself takes the sum of both means, of which `discriminator_loss` is half."""
PREVIEW_COLUMNS, PREVIEW_ROWS, PREVIEW_CLASSES = 8, 4, 10


@runtime_checkable
class SuperResolver(Protocol):
    """A generator that can learn from real pictures of low resolution beside noise."""

    @property
    def super_resolution_size(self) -> tuple[int, int] | None:
        """(h, w) of those pictures."""
        ...

    def super_resolve(self, low: Tensor) -> Tensor:
        """Pictures (B, C, h, w) -> (B, C, H, W)."""
        ...


class GANTask:
    """Trains a GANModel against a discriminator."""

    def __init__(self, config: GANTrainConfig, class_names: Sequence[str] = ()) -> None:
        """`class_names` are those of the data. Raises ConfigError where players and data do not fit."""
        self.config = config
        self.size, self.channels = config.data.height_width, config.data.gives["image"]
        self.model = GANModel(model_config(config, class_names))
        if config.super_resolution is not None and not isinstance(self.generator, SuperResolver):
            raise ConfigError(
                f"a generator of kind {config.generator.kind} makes nothing of pictures of low resolution: "
                "set super_resolution to null"
            )
        network = build_discriminator(
            config.discriminator, self.channels, size=self.size, num_classes=self.generator.num_classes
        )
        self.critic = Critic(network, config, loss_scale=WHOLE_SUM)
        decay = config.training.ema_decay
        self.ema = Ema(self.model, decay) if decay is not None else None
        self.nonfinite = NonFiniteSteps(config.training.on_nonfinite)
        self._notes: list[str] = []

    @property
    def generator(self) -> Generator:
        return self.model.generator

    def prepare(self, accelerator: Accelerator, total_steps: int) -> None:
        """Move to the device, wrap for several processes, build the optimisers. Raises ConfigError."""
        self.accelerator, self.total_steps = accelerator, total_steps
        self._parts = accelerator.num_processes * self.config.training.accumulation
        if self.config.painted_batch_size % self._parts:
            raise ConfigError(
                f"generator_batch_size {self.config.painted_batch_size} does not divide over "
                f"{accelerator.num_processes} processes with accumulation "
                f"{self.config.training.accumulation}; use a multiple of {self._parts}"
            )
        for module in (self.model, self.ema):
            if module is not None:
                module.to(accelerator.device)
        # A shell, since accelerate changes the forward of what it is given: the generator stays as it is.
        self._painter: nn.Module = accelerator.prepare_model(_Painter(self.generator))
        self._own_gradients = OwnGradients(self._painter)
        self.optimizer = adam(self.generator.parameters(), self.config.generator_optimizer)
        self.critic.prepare(accelerator, partial(adam, config=self.config.discriminator_optimizer))

    def train_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor]:
        """One update of the discriminator, and the generator's where it is due.

        Returns detached () values, equal on all processes. Where a term or a gradient of a player is not
        finite, on any process, that player does not move, nor the generator where it was the discriminator:
        the update is left out where the config says so; else UserError is raised.
        """
        self.model.train()
        self.critic.network.train()
        for generator in (self.generator, self._evaluated().generator):
            generator.before_step(step / self.total_steps)
        found = self._teach(micro_batches, step)
        logs, wrong = found.means, found.wrong
        if wrong is None and (step + 1) % self.config.discriminator_steps == 0:
            found = self._learn(micro_batches, step)
            wrong = found.wrong
            logs = logs | found.means if wrong is None else logs
        elif wrong is not None:
            logs = {}
        if wrong is None:
            self.nonfinite.made()
        elif note := self.nonfinite.refuse(step, wrong):
            self._notes.append(note)
        return logs

    def _teach(self, micro_batches: Sequence[Batch], step: int) -> StepValues:
        """The discriminator's update."""
        critic = self.critic
        critic.begin_step(learning_rate(self.config.discriminator_optimizer, step, self.total_steps))
        logs: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            real, labels = batch["image"], self._labels(batch)
            first, in_all = self._place(number, len(real))
            z = self._noise(len(real), purpose="discriminator", step=step, first=first)
            with torch.no_grad(), unchanged(self.generator), self.accelerator.autocast():
                fake = self.generator(z, labels).float()
            look = critic.look(real, self.config.training.seed, step, first, in_all)
            share, last = 1 / len(micro_batches), number == len(micro_batches) - 1
            _add(logs, critic.teach(real, fake, step, share, look, labels, last=last), share)
        norm = gradient_norm(critic.network.parameters())
        values = self._exchanged("discriminator", logs, norm, critic.own_gradients.take())
        if values.wrong is not None:
            critic.undo_step()
            return values
        clip_gradients(critic.network.parameters(), norm, self.config.training.clip_norm)
        critic.optimizer.step()
        critic.end_step(values.means)
        return values

    def _learn(self, micro_batches: Sequence[Batch], step: int) -> StepValues:
        """The generator's update."""
        set_learning_rate(
            self.optimizer, learning_rate(self.config.generator_optimizer, step, self.total_steps)
        )
        self.optimizer.zero_grad(set_to_none=True)
        before = ForwardState(self.generator), ForwardState(self.critic.network)
        directions = Directions(self.generator)
        logs: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            directions.turn_back()
            last = number == len(micro_batches) - 1
            with reduced_if(last, self.accelerator, self._painter):
                told = self._follow(batch, number, step, 1 / len(micro_batches))
            _add(logs, told, 1 / len(micro_batches))
        norm = gradient_norm(self.generator.parameters())
        values = self._exchanged("generator", logs, norm, self._own_gradients.take())
        if values.wrong is not None:
            self.optimizer.zero_grad(set_to_none=True)
            for state in before:
                state.restore()
            return values
        clip_gradients(self.generator.parameters(), norm, self.config.training.clip_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return values

    def _follow(self, batch: Batch, number: int, step: int, share: float) -> dict[str, Tensor]:
        """The generator's gradients for one micro-batch, times `share`; detached () values."""
        real, labels = batch["image"], self._labels(batch)
        num = self.config.painted_batch_size // self._parts
        first, in_all = self._place(number, num)
        if labels is not None:  # of the same pictures, whatever processes and micro-batches share them
            labels = labels[torch.arange(num, device=labels.device) * len(real) // num]
        z = self._noise(num, purpose="generator", step=step, first=first)
        with self.accelerator.autocast():
            images, restored = self._painter(z, labels, self._low(real))
        picture = images.detach().float().requires_grad_()
        seed = self.config.training.seed
        view = draw_view(
            self.config.augment, picture, seed=seed, step=step, first=first, in_all=in_all, stream=PAINTER
        )
        gradient, loss = self.critic.judge(picture, view, labels)
        logs = {"generator": loss}
        # The surrogate's gradient at the pictures is exactly `gradient`.
        surrogate = (images * gradient.to(images.dtype)).sum()
        if self.config.super_resolution is not None:
            error = F.mse_loss(restored.float(), real)
            surrogate = surrogate + self.config.super_resolution.weight * error
            logs["super_resolution"] = error.detach()
        self.accelerator.backward(share * surrogate)
        return logs

    def _exchanged(
        self, player: str, logs: dict[str, Tensor], norm: Tensor, own: Tensor | None
    ) -> StepValues:
        values = exchange(logs, {player: norm}, {} if own is None else {player: own})
        if values.wrong is None:
            values.means[f"gradient_{player}"] = values.norms[player]
        return values

    def _place(self, number: int, num: int) -> tuple[int, int]:
        """(number of the first, number of all) of a step's pictures, for micro-batch `number` of `num`."""
        rank, accumulation = self.accelerator.process_index, self.config.training.accumulation
        return (rank * accumulation + number) * num, self._parts * num

    def _noise(self, num: int, **place: Any) -> Tensor:
        z = draw_noise(num, self.generator.noise_dim, seed=self.config.training.seed, **place)
        return z.to(self.accelerator.device)

    def _labels(self, batch: Batch) -> Tensor | None:
        return batch["label"] if self.config.class_conditional else None

    def _low(self, real: Tensor) -> Tensor | None:
        """Real pictures in as few pixels as the generator's co-training takes."""
        if self.config.super_resolution is None:
            return None
        assert isinstance(self.generator, SuperResolver)
        return F.interpolate(real, size=self.generator.super_resolution_size, mode="area")

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """feature_distance of as many samples as there are pictures, of the same classes, to these."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        generator = self._evaluated().generator
        distance = FeatureDistance(self.size, self.channels, device=self.accelerator.device)
        done = 0
        for batch in batches:
            real = batch["image"]
            # Pictures are dealt out to the processes one by one.
            z = self._noise(len(real), first=done * processes + rank, stride=processes)
            done += len(real)
            distance.add_real(real)
            distance.add_generated(paint(generator, z, self._labels(batch), batch_size=len(real)))
        return {"feature_distance": distance.value()}

    @torch.no_grad()
    def preview(self, batch: Batch) -> Tensor:
        """Samples of the same noise each time, (C, H, W) in [-1, 1]: where there are classes a row of each,
        a column of the same noise."""
        from taming.data.picture import tile

        generator = self._evaluated().generator
        num_classes = generator.num_classes
        rows = PREVIEW_ROWS if num_classes is None else min(num_classes, PREVIEW_CLASSES)
        labels = None
        if num_classes is None:
            z = self._noise(rows * PREVIEW_COLUMNS)
        else:
            z = self._noise(PREVIEW_COLUMNS).repeat(rows, 1)
            labels = torch.arange(rows).repeat_interleave(PREVIEW_COLUMNS)
        return tile(paint(generator, z, labels, batch_size=PREVIEW_COLUMNS), columns=PREVIEW_COLUMNS)

    @property
    def guard(self) -> CollapseGuard | None:
        """Nothing is reconstructed that could collapse."""
        return None

    def notes(self) -> list[str]:
        """What the user should be told, since the last call."""
        taken, self._notes[:] = list(self._notes), []
        return taken

    def modules(self) -> dict[str, nn.Module]:
        """Everything that has state, unwrapped, by name."""
        named: dict[str, nn.Module | None] = {
            "model": self.model,
            "ema": self.ema,
            "discriminator": self.critic.network,
            "lecam": self.critic.lecam,
            "nonfinite": self.nonfinite,
        }
        return {name: module for name, module in named.items() if module is not None}

    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers of the players."""
        return {"model": self.optimizer, "discriminator": self.critic.optimizer}

    def save_model(self, folder: Path) -> None:
        """Write the averaged model, or the model itself where none is averaged, and the discriminator."""
        self._evaluated().save_pretrained(folder)
        save_discriminator(folder, self.config.discriminator, self.critic.network)

    def _evaluated(self) -> GANModel:
        model = self.model if self.ema is None else self.ema.module
        assert isinstance(model, GANModel)
        return model


def model_config(config: GANTrainConfig, class_names: Sequence[str]) -> GANModelConfig:
    """What is saved of the generator. Raises ConfigError where classes are wanted that the data has not."""
    names = tuple(class_names) if config.class_conditional else ()
    if config.class_conditional and not names:
        raise ConfigError(
            "class_conditional needs pictures with classes; set data.class_labels: true, or "
            "class_conditional: false"
        )
    return GANModelConfig(
        generator=config.generator,
        size=config.data.height_width,
        channels=config.data.gives["image"],
        num_classes=len(names) or None,
        class_names=names,
    )


class _Painter(nn.Module):
    """All that the generator paints in a step, in one forward, as DDP wants it."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, z: Tensor, labels: Tensor | None, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        restored = None
        if low is not None:
            assert isinstance(self.generator, SuperResolver)
            restored = self.generator.super_resolve(low)
        return self.generator(z, labels), restored


def _add(logs: dict[str, Tensor], more: dict[str, Tensor], share: float) -> None:
    for name, value in more.items():
        logs[name] = logs.get(name, 0) + share * value
