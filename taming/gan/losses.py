"""What each player of a GAN minimises. Logits are (B, 1, ...): all but the batch is averaged alike."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

AdversarialLoss = Literal["hinge", "vanilla", "non_saturating", "wasserstein"]


def generator_loss(logits_fake: Tensor, kind: AdversarialLoss = "hinge") -> Tensor:
    """What the painter minimises, ().

    hinge, vanilla and wasserstein: -mean D(fake) (Lim and Ye 2017, arXiv:1705.02894; Arjovsky et al. 2017,
    arXiv:1701.07875; the published VQGAN uses it with hinge and vanilla); non_saturating: mean
    softplus(-D(fake)) (Goodfellow et al. 2014, arXiv:1406.2661, section 3), whose pull fades where the
    discriminator is convinced.
    """
    match kind:
        case "hinge" | "vanilla" | "wasserstein":
            return -logits_fake.mean()
        case "non_saturating":
            return F.softplus(-logits_fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """Half of the two means, (), as the published VQGAN has it; a GAN by itself takes twice as much, the sum.

    hinge: relu(1 - D(real)) + relu(1 + D(fake)); vanilla and non_saturating: softplus(-D(real)) +
    softplus(D(fake)) (Goodfellow et al. 2014, the logistic form); wasserstein: D(fake) - D(real), which has
    no bound and needs a gradient penalty or spectral norms.
    """
    match kind:
        case "hinge":
            return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())
        case "vanilla" | "non_saturating":
            return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())
        case "wasserstein":
            return 0.5 * (logits_fake.mean() - logits_real.mean())
