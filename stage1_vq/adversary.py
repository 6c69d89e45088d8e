"""The second player: a discriminator, its optimiser, what it says of a reconstruction, and how it learns.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_vq.adversarial_config import AdversarialConfig
from stage1_vq.loss import gradient_ratio
from taming.gan.augment import View, draw_view
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.saved import load_discriminator, save_discriminator
from taming.gan.generator import Painter
from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.regularisers import LeCam, gradient_penalty
from taming.layers.actnorm import ActNorm
from taming.layers.spectral_norm import Directions
from taming.training.distributed import reduced_if
from taming.training.gradients import OwnGradients
from taming.training.guard import CollapseGuard
from taming.training.plateau import Plateau
from taming.training.schedule import set_learning_rate


@dataclass(frozen=True)
class Judgement:
    """What it wants of the reconstructions of one micro-batch."""

    gradient: Tensor
    """(B, C, H, W): of its unweighted loss at the reconstruction."""
    at_last_layer: Tensor | None
    """(2, *W) fp32: the gradients of all other losses and of its own at the decoder's last weight (*W), where
    the weight follows from them."""
    loss: Tensor
    """() detached."""


class Adversary:
    """Judges reconstructions, and learns to tell them from pictures.

    A step calls `begin_step`, for each micro-batch `view`, `judge` and `teach`, `weigh` once it has judged
    what it is to weigh, steps the optimiser, and ends with `end_step`, or with `undo_step` where it is left
    out.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int, notes: list[str]) -> None:
        """`notes` takes what the user should be told."""
        self.config, self.notes = config, notes
        self.discriminator = build_discriminator(config.network, in_channels)
        self.lecam = LeCam(config.lecam) if config.lecam is not None else None
        self.plateau = Plateau(config.start_on_plateau) if config.start_on_plateau is not None else None
        self.guard: CollapseGuard | None = None
        if config.guard is not None and config.weight:
            self.guard = CollapseGuard(config.guard, counts=lambda step: self.factor(step) > 0)
        parts = {"lecam": self.lecam, "plateau": self.plateau, "guard": self.guard}
        self.state = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        """All that it remembers beside the network and its optimiser."""
        self._before: list[tuple[Tensor, Tensor]] = []
        self._directions: dict[str, Directions] = {}

    def start_from(self, source: str) -> None:
        """Take the weights of the discriminator saved beside the model `source`; notes what became of it."""
        problem = load_discriminator(source, self.discriminator, self.config.network)
        if problem is not None:
            self.notes.append(f"{problem}: this run's starts anew")

    def save(self, folder: Path) -> None:
        """Write the discriminator beside the model in `folder`, so that fine-tuning can go on with it."""
        save_discriminator(folder, self.config.network, self.discriminator)

    def prepare(
        self, accelerator: Accelerator, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    ) -> None:
        """Move to the device, wrap for several processes, build the optimiser."""
        self.accelerator = accelerator
        self.discriminator.to(accelerator.device)
        self.state.to(accelerator.device)
        # A shell, since accelerate changes the forward of what it is given: the network stays as it is.
        self._both: nn.Module = accelerator.prepare_model(_RealAndFake(self.discriminator))
        self.own_gradients = OwnGradients(self._both)
        self.optimizer = make_optimizer(self.discriminator.parameters())

    def plays(self, step: int) -> bool:
        """Whether it learns, and perhaps judges, at `step`; where not, it costs nothing."""
        return step >= self._start() and (self.guard is None or self.guard.scale > 0)

    def factor(self, step: int) -> float:
        """Share in [0, 1] of its weight at `step`."""
        if not self.plays(step):
            return 0.0
        if self.guard is None:
            return self.config.factor(step - self._start())
        return self.guard.scale * self.config.factor(step - max(self._start(), self.guard.resumed_step))

    def begin_step(self, rate: float) -> None:
        """Before a step in which it plays; `rate` is the autoencoder's learning rate."""
        set_learning_rate(self.optimizer, rate * self.config.learning_rate_ratio)
        self.optimizer.zero_grad(set_to_none=True)
        changing = [tensor for part in self.discriminator.modules() for tensor in _changed_by_forward(part)]
        self._before = [(tensor, tensor.detach().clone()) for tensor in changing]
        self._directions.clear()

    @torch.no_grad()
    def undo_step(self) -> None:
        """In place of the update: what forward alone has changed is as it was, and no gradient is left."""
        self.optimizer.zero_grad(set_to_none=True)
        for tensor, before in self._before:
            tensor.copy_(before)
        for part in self.discriminator.modules():
            if isinstance(part, ActNorm):
                part.ready = False

    def view(self, images: Tensor, seed: int, step: int, first: int, in_all: int) -> View:
        """One random view of a micro-batch for both players: a pair differs in what was painted alone.

        `images` are the pictures from number `first` on of the `in_all` of the step.
        """
        return draw_view(self.config.augment, images, seed=seed, step=step, first=first, in_all=in_all)

    def balances(self, step: int) -> bool:
        """Whether its weight at `step` follows from gradients."""
        return self.config.weight_mode == "adaptive" and self.factor(step) > 0

    def judge(
        self,
        picture: Tensor,
        wanted: Tensor,
        features: tuple[Tensor, ...],
        painter: Painter,
        step: int,
        view: View,
    ) -> Judgement | None:
        """What the reconstruction `picture` (B, C, H, W, a leaf) is to follow beside `wanted`.

        `wanted` (B, C, H, W) is the gradient of all other losses there; the last layer of `painter` made the
        picture of `features`. None while it only watches.
        """
        if not self.factor(step):
            return None
        self._turn_back("judge")
        # Unwrapped and without weight gradients: this pass judges, it does not learn.
        with frozen(self.discriminator), self.accelerator.autocast():
            logits = self.discriminator(view(picture)).float()
        loss = generator_loss(logits, self.config.loss)
        (gradient,) = torch.autograd.grad(loss, picture)
        at_last_layer = None
        if self.balances(step):
            with self.accelerator.autocast():
                both = [painter.last_gradient(features, g).float() for g in (wanted, gradient)]
            at_last_layer = torch.stack(both)
        return Judgement(gradient, at_last_layer, loss.detach())

    def weigh(self, judgements: Sequence[Judgement]) -> Tensor:
        """Its weight () for micro-batches of one size, the same on every process.

        The gradients that it balances are means over all of them and over processes before their lengths are
        taken.
        """
        at_last_layer = [given.at_last_layer for given in judgements if given.at_last_layer is not None]
        ratio: Tensor | float = 1.0
        if at_last_layer:
            ratio = gradient_ratio(*torch.stack(at_last_layer).mean(0))
        return self.config.weight * torch.as_tensor(ratio, device=judgements[0].loss.device)

    def teach(
        self, real: Tensor, fake: Tensor, step: int, share: float, view: View, *, last: bool
    ) -> dict[str, Tensor]:
        """Its own gradients for one micro-batch, times `share`; both (B, C, H, W), detached.

        `last`: no other micro-batch of the step follows.
        """
        self._turn_back("teach")
        r1 = self.config.r1
        penalised = r1 is not None and r1.due(step)
        real, fake = view(real), view(fake)
        if penalised:
            real = real.detach().requires_grad_()
        with reduced_if(last, self.accelerator, self._both):
            with self.accelerator.autocast():
                logits_real, logits_fake = self._both(real, fake)
            logits_real, logits_fake = logits_real.float(), logits_fake.float()
            loss = discriminator_loss(logits_real, logits_fake, self.config.loss)
            logs = {
                "discriminator": loss.detach(),
                "logits_real": logits_real.detach().mean(),
                "logits_fake": logits_fake.detach().mean(),
            }
            # One backward for all terms: DDP exchanges gradients once.
            if self.lecam is not None:
                term = self.lecam(logits_real, logits_fake)
                loss = loss + self.lecam.config.weight * term
                logs["lecam"] = term.detach()
            if penalised:
                assert r1 is not None
                penalty = gradient_penalty(logits_real, real)
                loss = loss + r1.factor() * penalty
                logs["r1"] = penalty.detach()
            self.accelerator.backward(share * loss)
        return logs

    def _turn_back(self, phase: str) -> None:
        """Let each micro-batch meet the spectral norms that the first one met in this phase of the step."""
        if phase not in self._directions:
            self._directions[phase] = Directions(self.discriminator)
        self._directions[phase].turn_back()

    def end_step(self, step: int, logs: dict[str, Tensor], values: dict[str, float], *, last: bool) -> None:
        """After every step, played or not; `logs` are the step's means over processes, `values` read."""
        if self.lecam is not None and "logits_real" in logs:
            self.lecam.update(logs["logits_real"], logs["logits_fake"])
        waits = self.plateau is not None and step + 1 < self.config.start_step
        if self.plateau is not None and waits and self.plateau.observe(step, values["nll"]):
            window, share = self.plateau.config.window, self.plateau.config.share
            self.notes.append(
                f"the loss fell by less than {share:.1%} over {window} steps: the discriminator starts"
            )
        if self.guard is not None:
            self.guard.observe(step, values["rec"], values.get("blind", 0.0), last=last)

    def _start(self) -> int:
        if self.plateau is not None and self.plateau.reached >= 0:
            return min(self.plateau.reached, self.config.start_step)
        return self.config.start_step


class _RealAndFake(nn.Module):
    """Both batches in one forward, as DDP wants it, each with its own batch statistics, as published."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


def _changed_by_forward(part: nn.Module) -> Iterator[Tensor]:
    """The tensors of `part` alone that a forward in train mode may change."""
    yield from part.buffers(recurse=False)
    if isinstance(part, ActNorm) and not part.ready:  # its first batch sets its weights
        yield from part.parameters(recurse=False)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but not into its weights."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
