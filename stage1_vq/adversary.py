"""The second player: a critic (taming.gan.critic), when it plays, and how much its word weighs.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_vq.adversarial_config import AdversarialConfig
from stage1_vq.loss import gradient_ratio
from taming.gan.augment import View
from taming.gan.critic import Critic
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.saved import load_discriminator, save_discriminator
from taming.gan.generator import Painter
from taming.training.guard import CollapseGuard
from taming.training.plateau import Plateau


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

    A step calls `begin_step`, for each micro-batch `critic.look`, `judge` and `critic.teach`, `weigh` once it
    has judged what it is to weigh, steps the critic's optimiser, and ends with `end_step`, or with
    `critic.undo_step` where it is left out.
    """

    def __init__(
        self, config: AdversarialConfig, in_channels: int, size: tuple[int, int], notes: list[str]
    ) -> None:
        """For pictures (in_channels, *size); `notes` takes what the user should be told."""
        self.config, self.notes = config, notes
        self.critic = Critic(build_discriminator(config.network, in_channels, size=size), config)
        self.plateau = Plateau(config.start_on_plateau) if config.start_on_plateau is not None else None
        self.guard: CollapseGuard | None = None
        if config.guard is not None and config.weight:
            self.guard = CollapseGuard(config.guard, counts=lambda step: self.factor(step) > 0)
        parts = {"lecam": self.critic.lecam, "plateau": self.plateau, "guard": self.guard}
        self.state = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        """All that it remembers beside the network and its optimiser."""

    @property
    def discriminator(self) -> nn.Module:
        return self.critic.network

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
        self.critic.prepare(accelerator, make_optimizer)
        self.state.to(accelerator.device)

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
        self.critic.begin_step(rate * self.config.learning_rate_ratio)

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
        gradient, loss = self.critic.judge(picture, view)
        at_last_layer = None
        if self.balances(step):
            with self.accelerator.autocast():
                both = [painter.last_gradient(features, g).float() for g in (wanted, gradient)]
            at_last_layer = torch.stack(both)
        return Judgement(gradient, at_last_layer, loss)

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

    def end_step(self, step: int, logs: dict[str, Tensor], values: dict[str, float], *, last: bool) -> None:
        """After every step, played or not; `logs` are the step's means over processes, `values` read."""
        self.critic.end_step(logs)
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
