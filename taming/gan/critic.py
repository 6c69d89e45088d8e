"""A discriminator that learns: its optimiser, its terms, and what it says of what was painted.

Stage one's adversary and a GAN by itself have it in common.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from taming.gan.augment import View, draw_view
from taming.gan.critic_config import CriticConfig
from taming.gan.forward_state import ForwardState, frozen
from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.noise import draw_shares
from taming.gan.regularisers import (
    LeCam,
    drift,
    gradient_penalty,
    inconsistency,
    interpolate,
    unit_gradient_penalty,
)
from taming.layers.spectral_norm import Directions
from taming.training.distributed import reduced_if
from taming.training.gradients import OwnGradients
from taming.training.schedule import set_learning_rate

PAINTER, CONSISTENCY = 1, 2
"""Streams of the views of what a painter learns from, where it was not painted for the critic too (0), and of
the views whose logits are compared."""


@dataclass(frozen=True)
class Look:
    """All that is random in how one micro-batch is judged."""

    view: View
    """How both players' pictures are seen."""
    other: View | None = None
    """What is done to them once more, where the logits of both are compared."""
    shares: Tensor | None = None
    """(B,) of the real picture in what lies between it and the painted one, where that is judged too."""


class Wish(NamedTuple):
    """What a discriminator wants of what was painted."""

    gradient: Tensor
    """(B, C, H, W): of the painter's loss at the pictures."""
    loss: Tensor
    """() detached."""


class Critic:
    """A discriminator and all that makes it learn.

    A step calls `begin_step`; for each micro-batch `look`, `judge` and `teach`, in either order; then it
    steps the optimiser and calls `end_step`, or `undo_step` where it is left out.
    `loss_scale` multiplies `discriminator_loss`, which is half of a sum: 2 gives the whole.
    """

    def __init__(self, network: nn.Module, config: CriticConfig, *, loss_scale: float = 1.0) -> None:
        """`network` maps pictures (B, C, H, W) and, where it judges them, classes (B,) to logits."""
        self.network, self.config, self.loss_scale = network, config, loss_scale
        self.lecam = LeCam(config.lecam) if config.lecam is not None else None
        self._before: ForwardState | None = None
        self._directions: dict[str, Directions] = {}

    def prepare(
        self, accelerator: Accelerator, make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    ) -> None:
        """Move to the device, wrap for several processes, build the optimiser."""
        self.accelerator = accelerator
        self.network.to(accelerator.device)
        if self.lecam is not None:
            self.lecam.to(accelerator.device)
        # A shell, since accelerate changes the forward of what it is given: the network stays as it is.
        self._all: nn.Module = accelerator.prepare_model(_All(self.network))
        self.own_gradients = OwnGradients(self._all)
        self.optimizer = make_optimizer(self.network.parameters())

    def begin_step(self, rate: float) -> None:
        """Before a step in which it learns at the rate `rate`."""
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad(set_to_none=True)
        self._before = ForwardState(self.network)
        self._directions.clear()

    def undo_step(self) -> None:
        """In place of the update: what forward alone has changed is as it was, and no gradient is left."""
        self.optimizer.zero_grad(set_to_none=True)
        assert self._before is not None
        self._before.restore()

    def look(self, images: Tensor, seed: int, step: int, first: int, in_all: int) -> Look:
        """How a micro-batch is looked at: `images`, from number `first` on of the `in_all` of a step.

        A function of seed, step and each picture's place, for whatever is looked at in its place.
        """
        consistency, shares, other = self.config.consistency, None, None
        if self.config.gradient_penalty is not None:
            shares = draw_shares(len(images), seed=seed, step=step, first=first).to(images.device)
        if consistency is not None:
            other = draw_view(
                consistency.augment,
                images,
                seed=seed,
                step=step,
                first=first,
                in_all=in_all,
                stream=CONSISTENCY,
            )
        view = draw_view(self.config.augment, images, seed=seed, step=step, first=first, in_all=in_all)
        return Look(view, other, shares)

    def judge(self, picture: Tensor, view: View, labels: Tensor | None = None) -> Wish:
        """What `picture` (B, C, H, W), a leaf, of the classes (B,) should follow to be taken for real."""
        self._turn_back("judge")
        # Unwrapped and without weight gradients: this pass judges, it does not learn.
        with frozen(self.network), self.accelerator.autocast():
            logits = self.network(view(picture), labels).float()
        loss = generator_loss(logits, self.config.loss)
        (gradient,) = torch.autograd.grad(loss, picture)
        return Wish(gradient, loss.detach())

    def teach(
        self,
        real: Tensor,
        fake: Tensor,
        step: int,
        share: float,
        look: Look,
        labels: Tensor | None = None,
        *,
        last: bool,
    ) -> dict[str, Tensor]:
        """Its own gradients for one micro-batch, times `share`.

        Both are (B, C, H, W), detached, of the classes `labels` (B,) where it judges them.
        `last`: no other micro-batch of the step follows. Returns detached () values.
        """
        self._turn_back("teach")
        config = self.config
        r1 = config.r1 if config.r1 is not None and config.r1.due(step) else None
        pictures = [look.view(real), look.view(fake)]
        if r1 is not None:
            pictures[0] = pictures[0].detach().requires_grad_()
        if look.other is not None:
            pictures += [look.other(pictures[0]), look.other(pictures[1])]
        between = None
        if look.shares is not None:
            between = interpolate(real, fake, look.shares).requires_grad_()
            pictures.append(look.view(between))
        with reduced_if(last, self.accelerator, self._all):
            with self.accelerator.autocast(), _differentiated(twice=r1 is not None or between is not None):
                logits = [given.float() for given in self._all(tuple(pictures), labels)]
            logits_real, logits_fake, *others = logits
            loss = self.loss_scale * discriminator_loss(logits_real, logits_fake, config.loss)
            logs = {
                "discriminator": loss.detach(),
                "logits_real": logits_real.detach().mean(),
                "logits_fake": logits_fake.detach().mean(),
            }
            # One backward for all terms: DDP exchanges gradients once.
            terms: dict[str, tuple[float, Tensor]] = {}
            if self.lecam is not None:
                terms["lecam"] = self.lecam.config.weight, self.lecam(logits_real, logits_fake)
            if r1 is not None:
                terms["r1"] = r1.factor(), gradient_penalty(logits_real, pictures[0])
            if between is not None:
                assert config.gradient_penalty is not None
                penalty = unit_gradient_penalty(others[-1], between)
                terms["gradient_penalty"] = config.gradient_penalty.weight, penalty
            if config.drift:
                terms["drift"] = config.drift, drift(logits_real)
            if config.consistency is not None:
                pairs = zip(("real", "fake"), (logits_real, logits_fake), others[:2], strict=True)
                for name, first, second in pairs:
                    weight: float = getattr(config.consistency, name)
                    terms[f"inconsistency_{name}"] = weight, inconsistency(first, second)
            for name, (weight, term) in terms.items():
                loss = loss + weight * term
                logs[name] = term.detach()
            self.accelerator.backward(share * loss)
        return logs

    def end_step(self, logs: dict[str, Tensor]) -> None:
        """After a step that was made; `logs` are its means over micro-batches and processes."""
        if self.lecam is not None and "logits_real" in logs:
            self.lecam.update(logs["logits_real"], logs["logits_fake"])

    def _turn_back(self, phase: str) -> None:
        """Let each micro-batch meet the spectral norms that the first one met in this phase of the step."""
        if phase not in self._directions:
            self._directions[phase] = Directions(self.network)
        self._directions[phase].turn_back()


class _All(nn.Module):
    """All batches in one forward, as DDP wants it, each with its own batch statistics, as published."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: tuple[Tensor, ...], labels: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self.network(batch, labels) for batch in pictures)


def _differentiated(*, twice: bool) -> AbstractContextManager[object]:
    """Around a forward: fused attention has no second derivative."""
    kernel: AbstractContextManager[object] = sdpa_kernel(SDPBackend.MATH) if twice else nullcontext()
    return kernel
