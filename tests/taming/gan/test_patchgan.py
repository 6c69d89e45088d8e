"""PatchGAN as published."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from taming.gan.discriminators.patchgan import PatchGAN, PatchGANConfig


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
