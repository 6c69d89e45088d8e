"""Recomputing layers against the plain ones, in value and gradient, and what they keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from taming.errors import ConfigError
from taming.layers.conv import norm_silu_conv, pad_conv, upsample_conv
from taming.layers.norm import group_norm, group_norm_silu
from taming.layers.spatial_attention import SpatialAttention

Layer = Callable[[Tensor, bool], Tensor]


def layers() -> dict[str, tuple[nn.Module, Layer]]:
    torch.manual_seed(0)
    norm, same, strided = group_norm(8, 4), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias)
    return {
        "norm_silu": (norm, lambda x, r: group_norm_silu(x, norm, recompute=r)),
        "norm_silu_conv": (
            nn.ModuleList([norm, same]),
            lambda x, r: norm_silu_conv(x, norm, same, recompute=r),
        ),
        "upsample_conv": (same, lambda x, r: upsample_conv(x, same, recompute=r)),
        "pad_conv": (strided, lambda x, r: pad_conv(x, strided, recompute=r)),
    }


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_recomputed_layers_are_the_plain_ones(name: str, layout: torch.memory_format):
    module, layer = layers()[name]
    module.double().to(memory_format=layout)
    x = torch.randn(2, 8, 6, 10, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    results = []
    for recompute in (True, False):
        module.zero_grad()
        y = layer(x, recompute)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x, retain_graph=True)
        y.cos().sum().backward(inputs=list(module.parameters()))
        results.append([y.detach(), gradient, *(p.grad.clone() for p in module.parameters())])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(layers()))
def test_half_precision_stays_near_and_its_weights_get_full_precision_gradients(name: str):
    module, layer = layers()[name]
    x = torch.randn(2, 8, 6, 10).bfloat16().float()
    exact = layer(x, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x.bfloat16(), True)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= 0.02 * exact.norm()
    found.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in module.parameters())


def kept_elements(layer: Layer, x: Tensor, recompute: bool) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim == 4 and tensor.shape[0] == x.shape[0]:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, recompute)
    return sum(kept.values())


def test_only_the_input_is_kept():
    x = torch.randn(3, 8, 8, 8, requires_grad=True)
    for name, times in (("norm_silu_conv", 3), ("upsample_conv", 4), ("pad_conv", 1)):
        _, layer = layers()[name]
        assert kept_elements(layer, x, True) == x.numel(), name
        assert kept_elements(layer, x, False) >= times * x.numel(), name


def test_attention_is_the_written_out_softmax():
    torch.manual_seed(0)
    attention = SpatialAttention(8, 4)
    x = torch.randn(2, 8, 3, 5)
    h = attention.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (attention.q, attention.k, attention.v))
    expected = torch.zeros_like(v)
    for b in range(2):
        for cell in range(15):
            weights = torch.softmax(torch.stack([q[b, :, cell] @ k[b, :, j] for j in range(15)]) / 8**0.5, 0)
            expected[b, :, cell] = v[b] @ weights
    wanted = x + attention.proj_out(expected.view_as(x))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-5, atol=1e-5)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="norm_num_groups 3 does not divide a layer of 8 channels"):
        group_norm(8, 3)
