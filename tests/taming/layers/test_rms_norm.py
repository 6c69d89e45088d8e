"""The written-out normalisation against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from taming.layers.rms_norm import RMSNorm


def both(x: torch.Tensor, norm: RMSNorm) -> list[list[torch.Tensor]]:
    """Value, and gradients of input and weight, by ours and by torch in fp64."""
    found = []
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for dtype, call in (
        (x.dtype, norm),
        (torch.float64, lambda t: functional.rms_norm(t, (norm.width,), weight, norm.eps)),
    ):
        weight = norm.weight.detach().to(dtype).requires_grad_()
        leaf = x.detach().to(dtype).requires_grad_()
        norm.weight.grad = None
        y = call(leaf)
        y.backward(direction.to(y.dtype))
        grad_weight = norm.weight.grad if norm.weight.grad is not None else weight.grad
        assert leaf.grad is not None
        assert grad_weight is not None
        found.append([y.detach().double(), leaf.grad.double(), grad_weight.double()])
    return found


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
    ours, expected = both(x, norm)
    for a, b in zip(ours, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < tolerance


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
