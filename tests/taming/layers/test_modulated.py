"""Modulated layers beside loops over samples, with the weights written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taming.layers.modulated import ModulatedConv2d, ModulatedLinear


@pytest.mark.parametrize("demodulate", [True, False])
def test_the_linear_layer_is_a_loop_over_samples(demodulate: bool):
    torch.manual_seed(0)
    layer = ModulatedLinear(5, 4, 3, demodulate=demodulate)
    torch.nn.init.normal_(layer.bias)
    x, style = torch.randn(2, 6, 7, 5), torch.randn(2, 6, 3)
    out = layer(x, style)
    for picture in range(2):
        for token in range(6):
            weight = layer.weight / 5**0.5 * (1 + layer.scale(style[picture, token]))
            if demodulate:
                weight = weight / weight.norm(dim=1, keepdim=True)
            torch.testing.assert_close(
                out[picture, token], F.linear(x[picture, token], weight, layer.bias), rtol=1e-4, atol=1e-5
            )
    # Points that all places share need not be repeated.
    torch.testing.assert_close(layer(x[0, 0], style)[0, 0], out[0, 0])


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_the_convolution_is_a_loop_over_samples(size: int, demodulate: bool):
    torch.manual_seed(0)
    layer = ModulatedConv2d(5, 4, size, 3, demodulate=demodulate)
    torch.nn.init.normal_(layer.bias)
    x, style = torch.randn(2, 5, 6, 8), torch.randn(2, 3)
    out = layer(x, style)
    for picture in range(2):
        scale = 1 + layer.scale(style[picture])
        weight = layer.weight / (5 * size**2) ** 0.5 * scale[:, None, None]
        if demodulate:
            weight = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
        wanted = F.conv2d(x[picture], weight, layer.bias, padding=size // 2)
        torch.testing.assert_close(out[picture], wanted, rtol=1e-4, atol=1e-5)


def test_demodulation_takes_the_size_of_the_style_out_and_leaves_its_direction():
    torch.manual_seed(0)
    layer = ModulatedLinear(5, 4, 3)
    torch.nn.init.constant_(layer.scale.bias, -1)  # W' = s W, and s linear in the style
    x, style = torch.randn(7, 5), torch.randn(1, 3)
    torch.testing.assert_close(layer(x, style), layer(x, 10 * style), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x, style), layer(x, style.flip(1)), atol=0.1)


def test_they_can_be_differentiated_twice():
    torch.manual_seed(0)
    for layer, x in (
        (ModulatedLinear(3, 2, 4).double(), torch.randn(2, 5, 3)),
        (ModulatedConv2d(3, 2, 3, 4).double(), torch.randn(2, 3, 4, 4)),
    ):
        inputs = (x.double().requires_grad_(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True))
        assert torch.autograd.gradgradcheck(layer, inputs)
