"""Terms that keep a discriminator from growing too sure of itself.

Axes: B pictures, C channels, H W pixels.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from taming.collective import mean_over_processes
from taming.config import Config
from taming.gan.augment import AugmentConfig


class R1Config(Config):
    """Gradient penalty on real pictures (Mescheder et al. 2018, arXiv:1801.04406), lazily (1912.04958, B)."""

    weight: float = Field(default=10.0, gt=0)
    """The papers' gamma: the term is gamma / 2 * E |grad D(real)|^2."""
    interval: int = Field(default=16, ge=1)
    """Computed every so many steps, and then that many times as heavy."""

    def due(self, step: int) -> bool:
        """Whether the term is computed at `step`."""
        return step % self.interval == 0

    def factor(self) -> float:
        """What the penalty counts at a step at which it is due."""
        return 0.5 * self.weight * self.interval


class LeCamConfig(Config):
    """Regularisation for little data (Tseng et al. 2021, arXiv:2104.03310)."""

    weight: float = Field(default=0.01, gt=0)
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the running means of the logits, a step."""


class GradientPenaltyConfig(Config):
    """Pull of the gradient to length one between real and fake (Gulrajani et al. 2017, arXiv:1704.00028)."""

    weight: float = Field(default=10.0, gt=0)


class ConsistencyConfig(Config):
    """Balanced consistency, bCR (Zhao et al. 2020, arXiv:2002.04724): logits ought not to change with a
    view."""

    real: float = Field(default=10.0, ge=0)
    """Weight of the term of real pictures."""
    fake: float = Field(default=10.0, ge=0)
    augment: AugmentConfig = AugmentConfig(policy=("translation", "cutout"))


def gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """Mean over pictures of |d D / d picture|^2, (); D is the mean of a picture's logits (B, 1, ...).

    `pictures` (B, C, H, W) is the leaf that the logits were computed from. The result is differentiable.
    """
    return _gradient_squares(logits, pictures).mean()


def unit_gradient_penalty(logits: Tensor, pictures: Tensor) -> Tensor:
    """Mean over pictures of (|d D / d picture| - 1)^2, (): as `gradient_penalty`, but two-sided about one."""
    return (_gradient_squares(logits, pictures) + 1e-12).sqrt().sub(1).square().mean()


def interpolate(real: Tensor, fake: Tensor, shares: Tensor) -> Tensor:
    """Pictures on the lines between pairs: share (B,) of real plus the rest of fake, both (B, C, H, W)."""
    return torch.lerp(fake, real, shares.to(real)[:, None, None, None])


def drift(logits_real: Tensor) -> Tensor:
    """(E D(real))^2, () (Karras et al. 2018, arXiv:1710.10196, A.1, have E of the square; TransGAN has this).

    Its mean over processes, and so its gradient, is that of all processes' pictures.
    """
    own = logits_real.mean()
    whole = mean_over_processes(own.detach())
    return whole * (2 * own - whole)


def inconsistency(logits: Tensor, logits_of_view: Tensor) -> Tensor:
    """Mean squared difference, (), of logits of one shape."""
    return (logits - logits_of_view).square().mean()


class LeCam(nn.Module):
    """E (D(real) - mean_fake)^2 + E (D(fake) - mean_real)^2 with running means of the logits (their Eq. 5).

    The means start as those of the first step, and the term counts from the second step on.
    """

    def __init__(self, config: LeCamConfig) -> None:
        super().__init__()
        self.config = config
        self.means: Tensor
        self.steps: Tensor
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        """The unweighted term, (), for logits (B, 1, ...)."""
        mean_real, mean_fake = self.means.unbind()
        term = (logits_real - mean_fake).square().mean() + (logits_fake - mean_real).square().mean()
        # Without a branch on the device's value, which would have to be waited for.
        return term * (self.steps > 0)

    @torch.no_grad()
    def update(self, mean_real: Tensor, mean_fake: Tensor) -> None:
        """Take in the means () of a whole step, the same on every process."""
        current = torch.stack((mean_real, mean_fake)).to(self.means)
        decay = torch.where(self.steps > 0, self.config.decay, 0.0)
        self.means.copy_(decay * self.means + (1 - decay) * current)
        self.steps.add_(1)


def _gradient_squares(logits: Tensor, pictures: Tensor) -> Tensor:
    """|d D / d picture|^2 of each picture, (B,), differentiable."""
    # Pictures of a batch meet in batch statistics only: the gradient of the sum is each one's own.
    per_picture = logits.float().flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(per_picture.sum(), pictures, create_graph=True)
    return gradient.float().square().flatten(1).sum(1)
