"""Rotary positions on a grid."""

from __future__ import annotations

import torch

from taming.layers.position import grid_cells, rotary_2d, rotate


def test_scores_depend_on_the_difference_of_cells_alone() -> None:
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        def turned(x: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
            return rotate(x[None], rotary_2d(torch.tensor([cell]), 8))[0]

        return turned(query, a) @ turned(key, b)

    torch.testing.assert_close(score((2, 5), (0, 1)), score((7, 6), (5, 2)), atol=1e-6, rtol=0)
    assert not torch.isclose(score((2, 5), (0, 1)), score((5, 2), (1, 0)))


def test_closed_form() -> None:
    """With four channels there is one plane an axis, of frequency 1."""
    cos, sin = rotary_2d(torch.tensor([[2, 3]]), 4)
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])  # planes are (0, 2) for rows and (1, 3) for columns
    row, column = torch.tensor(2.0), torch.tensor(3.0)
    expected = torch.stack((row.cos(), -column.sin(), row.sin(), column.cos()))
    torch.testing.assert_close(rotate(x, (cos, sin))[0], expected)


def test_grid_cells_are_in_raster_order() -> None:
    assert grid_cells(2, 3).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
