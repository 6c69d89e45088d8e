"""The written-out gradients of rotation and of SwiGLU against autograd's."""

from __future__ import annotations

import torch
from torch.nn import functional

from taming.layers.position import grid_cells, rotary_2d, rotate
from taming.layers.swiglu import swiglu


def test_swiglu_value_and_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(3, 5, 7, dtype=torch.float64)
    gate, up = x.chunk(2, dim=-1)
    expected = functional.silu(gate) * up
    (expected_gradient,) = torch.autograd.grad(expected, x, direction)
    ours = swiglu(x)
    (gradient,) = torch.autograd.grad(ours, x, direction)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    with torch.no_grad():
        torch.testing.assert_close(swiglu(x), expected)


def test_rotation_gradient_of_a_permuted_tensor() -> None:
    torch.manual_seed(0)
    rotation = tuple(table.double() for table in rotary_2d(grid_cells(2, 3), 8))
    x = torch.randn(2, 6, 4, 8, dtype=torch.float64, requires_grad=True).transpose(1, 2)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rotation), (x.detach().requires_grad_(),))
    with torch.no_grad():
        still = rotate(x, rotation)
    torch.testing.assert_close(rotate(x, rotation), still)
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation
    torch.testing.assert_close(still, torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
