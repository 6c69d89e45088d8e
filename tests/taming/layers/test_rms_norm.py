"""The written-out normalisation against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taming.layers.rms_norm import RMSNorm


def value_and_gradients(x: torch.Tensor, norm: RMSNorm, *, ours: bool) -> list[torch.Tensor]:
    """Value, and gradients of input and weight: by ours in the type of x, or by torch in fp64."""
    dtype = x.dtype if ours else torch.float64
    leaf, weight = x.detach().to(dtype).requires_grad_(), norm.weight.detach().double().requires_grad_()
    y = norm(leaf) if ours else functional.rms_norm(leaf, (norm.width,), weight, norm.eps)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(y, (leaf, norm.weight if ours else weight), direction.to(y.dtype))
    return [y.detach().double(), *(gradient.double() for gradient in gradients)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_value_and_gradients(dtype: torch.dtype, tolerance: float, contiguous: bool) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(24) + 0.5)
    x = (3 * torch.randn(5, 2, 7, 24)).to(dtype)
    if not contiguous:
        x = x.permute(2, 0, 1, 3)
    ours, expected = value_and_gradients(x, norm, ours=True), value_and_gradients(x, norm, ours=False)
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
