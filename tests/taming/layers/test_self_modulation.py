"""SLN: the formula, and that it hears the style alone."""

from __future__ import annotations

import torch

from taming.layers.modulation import SelfModulatedLayerNorm


def test_each_token_is_normalised_and_the_style_scales_it():
    torch.manual_seed(0)
    norm = SelfModulatedLayerNorm(6, 3, linear="equalised")
    x, style = 5 + 3 * torch.randn(2, 4, 6), torch.randn(2, 3)
    gamma, beta = norm.linear(style)[:, None].chunk(2, dim=-1)
    deviation = x.var(-1, correction=0, keepdim=True).sqrt()
    wanted = (1 + gamma) * (x - x.mean(-1, keepdim=True)) / deviation + beta
    torch.testing.assert_close(norm(x, style), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(norm(x, style), norm(x, style.flip(0)), atol=0.1)


def test_a_style_of_zero_is_a_plain_layer_norm():
    norm = SelfModulatedLayerNorm(6, 3)
    x = torch.randn(2, 4, 6)
    plain = torch.nn.functional.layer_norm(x, (6,), eps=1e-6)
    torch.testing.assert_close(norm(x, torch.zeros(2, 3)), plain)
