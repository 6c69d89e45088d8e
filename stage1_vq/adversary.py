"""The second player: a discriminator, its optimiser, what it says of a reconstruction, and how it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from stage1_vq.config import AdversarialConfig
from stage1_vq.loss import gradient_ratio, last_conv_gradient
from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.patchgan import PatchGAN
from taming.training.distributed import reduced_if
from taming.training.schedule import set_learning_rate


class Adversary:
    """Judges reconstructions, and learns to tell them from pictures."""

    def __init__(self, config: AdversarialConfig, in_channels: int) -> None:
        self.config = config
        self.discriminator = PatchGAN(config.network, in_channels)

    def prepare(self, accelerator: Accelerator, make_optimizer: Callable[[nn.Module], Optimizer]) -> None:
        """Move to the device, wrap for several processes, build the optimiser."""
        self.accelerator = accelerator
        self.discriminator.to(accelerator.device)
        # A shell, since accelerate changes the forward of what it is given: the network stays as it is.
        self._both: nn.Module = accelerator.prepare_model(_RealAndFake(self.discriminator))
        self.optimizer = make_optimizer(self.discriminator)

    def plays(self, step: int) -> bool:
        """Whether it learns, and perhaps judges, at `step`; where not, it costs nothing."""
        return step >= self.config.start_step

    def begin_step(self, rate: float) -> None:
        """Before a step in which it plays; `rate` is the autoencoder's learning rate."""
        set_learning_rate(self.optimizer, rate * self.config.learning_rate_ratio)
        self.optimizer.zero_grad(set_to_none=True)

    def judge(
        self, picture: Tensor, wanted: Tensor, features: Tensor, last_conv: nn.Conv2d, step: int
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """What the reconstruction `picture` (B, C, H, W, a leaf) is to follow beside `wanted`, and the log.

        `wanted` (B, C, H, W) is the gradient of all other losses there; the weight balances both at the
        weights of `last_conv`, which made the picture of `features`. None while it only watches.
        """
        factor = self.config.factor(step)
        if not factor:
            return None, {}
        # Unwrapped and without weight gradients: this pass judges, it does not learn.
        with frozen(self.discriminator), self.accelerator.autocast():
            loss = generator_loss(self.discriminator(picture).float())
        (gradient,) = torch.autograd.grad(loss, picture)
        weight = torch.ones_like(loss)
        if self.config.weight_mode == "adaptive":
            weight = gradient_ratio(*(last_conv_gradient(features, last_conv, g) for g in (wanted, gradient)))
        weight = weight * self.config.weight
        return factor * weight * gradient, {"adversarial": loss.detach(), "adaptive_weight": weight}

    def teach(self, real: Tensor, fake: Tensor, share: float, last: bool) -> dict[str, Tensor]:
        """Its own gradients for one micro-batch, times `share`; both (B, C, H, W), detached."""
        with reduced_if(last, self.accelerator, self._both):
            with self.accelerator.autocast():
                logits_real, logits_fake = self._both(real, fake)
            logits_real, logits_fake = logits_real.float(), logits_fake.float()
            loss = discriminator_loss(logits_real, logits_fake, self.config.loss)
            self.accelerator.backward(share * loss)
        return {
            "discriminator": loss.detach(),
            "logits_real": logits_real.detach().mean(),
            "logits_fake": logits_fake.detach().mean(),
        }


class _RealAndFake(nn.Module):
    """Both batches in one forward, as DDP wants it, each with its own batch statistics, as published."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return self.discriminator(real), self.discriminator(fake)


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
