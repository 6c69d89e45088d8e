"""PatchGAN and the losses of both players."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taming.gan.losses import discriminator_loss, generator_loss
from taming.gan.patchgan import PatchGAN, PatchGANConfig


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_logits_and_gradients(norm: str):
    network = PatchGAN(PatchGANConfig(channels=8, num_layers=2, norm=norm), in_channels=1)
    logits = network(torch.randn(2, 1, 32, 40))
    assert logits.shape == (2, 1, 6, 8)
    logits.square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


def test_published_names_widths_and_first_values():
    torch.manual_seed(0)
    network = PatchGAN(PatchGANConfig())
    convs = {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert list(convs) == ["main.0", "main.2", "main.5", "main.8", "main.11"]
    assert [conv.out_channels for conv in convs.values()] == [64, 128, 256, 512, 1]
    assert [conv.stride[0] for conv in convs.values()] == [2, 2, 2, 1, 1]
    assert [conv.bias is not None for conv in convs.values()] == [True, False, False, False, True]
    norms = [name for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == ["main.3", "main.6", "main.9"]
    assert convs["main.8"].weight.std().item() == pytest.approx(0.02, rel=0.01)


def test_losses_at_known_logits():
    real, fake = torch.tensor([[[[0.5]]]]), torch.tensor([[[[-2.0]]]])
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.25)
    expected = 0.5 * (torch.log1p(torch.exp(-real)) + torch.log1p(torch.exp(fake))).item()
    assert discriminator_loss(real, fake, "vanilla").item() == pytest.approx(expected)
    assert generator_loss(fake).item() == pytest.approx(2.0)
