"""Attention among all tokens of a picture, or of each window of it.

Axes: B pictures, N tokens (h w cells), n tokens of a window or all N, H heads, C channels of a head, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from taming.layers.linears import LinearKind, make_linear, weight_of
from taming.layers.windows import from_windows, shift_mask, to_windows

Scores = Literal["dot", "l2_tied", "l2_kim"]
Grid = tuple[int, int]


class MultiHeadAttention(nn.Module):
    """proj(softmax(scores + bias) values), heads side by side.

    scores:
    - dot: q_i . k_j / sqrt(C) (Vaswani et al. 2017, arXiv:1706.03762);
    - l2_tied: -|q_i - q_j|^2 / sqrt(C) with keys that are the queries (ViTGAN, Lee et al. 2021,
      arXiv:2107.04589). Tying alone does not bound the gain: along directions that the queries do not see, it
      grows with the input;
    - l2_kim: the same scores, and values X A_h W_v with A_h = W_q W_q^T / sqrt(C) for the values
      X W_v (Kim et al. 2021, arXiv:2006.04710): this form is Lipschitz.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        scores: Scores = "dot",
        linear: LinearKind = "plain",
        qkv_bias: bool = False,
        relative_grid: Grid | None = None,
        window: int | None = None,
        shift: int = 0,
    ) -> None:
        """`relative_grid`: with a learned bias for each offset within a grid of that size, or within the
        window where there is one. `window`: attend within squares of so many cells a side, `shift` of them
        moved. A map no larger than a window is one window, which is never shifted."""
        super().__init__()
        assert width % num_heads == 0, f"{num_heads} heads do not divide a width of {width}"
        assert window is None or 0 <= shift < window
        self.width, self.num_heads, self.scores = width, num_heads, scores
        self.window, self.shift = window, shift
        self.query = make_linear(linear, width, width, qkv_bias and scores == "dot")
        self.key = make_linear(linear, width, width, qkv_bias) if scores == "dot" else None
        self.value = make_linear(linear, width, width, qkv_bias)
        self.proj = make_linear(linear, width, width)
        self.relative: RelativeBias | None = None
        if relative_grid is not None:
            if window is not None:
                relative_grid = (min(relative_grid[0], window), min(relative_grid[1], window))
            self.relative = RelativeBias(relative_grid, num_heads)

    def forward(self, x: Tensor, *, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `grid` (h, w) is needed with windows.

        `mask` is bool, broadcast to (B, H, N, N), True = attend; not together with windows.
        """
        if not self._windowed(grid):
            return self._attend(x, self._bias(grid), mask)
        assert grid is not None
        assert self.window is not None
        assert mask is None, "windows bring their own mask"
        windows = to_windows(x, grid, self.window, self.shift)
        mask, repeated = self._window_mask(grid, x.device), len(windows) // len(x)
        if mask is None or self.scores != "dot":  # what is added differs between pictures, or is small
            mask = None if mask is None else mask.repeat(len(x), 1, 1, 1)
            repeated = 1
        attended = self._attend(windows, self._bias(grid), mask, windows=repeated)
        return from_windows(attended, grid, self.window, self.shift)

    def probabilities(self, x: Tensor, *, grid: Grid | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, H, N, N), or (B windows, H, n, n): how much each token looks at each, for probes."""
        if self._windowed(grid):
            assert grid is not None
            assert self.window is not None
            mask, pictures = self._window_mask(grid, x.device), len(x)
            x = to_windows(x, grid, self.window, self.shift)
            mask = None if mask is None else mask.repeat(pictures, 1, 1, 1)
        query, key, _ = self._projections(x)
        scale, added = self._scale_and_bias(key, self._bias(grid), mask)
        products = scale * query @ key.transpose(-2, -1)
        if added is not None and added.dtype == torch.bool:
            products = products.masked_fill(~added, float("-inf"))
        elif added is not None:
            products = products + added
        return products.softmax(-1)

    def _windowed(self, grid: Grid | None) -> bool:
        if self.window is None:
            return False
        assert grid is not None, "attention in windows needs the grid"
        if max(grid) <= self.window:
            return False
        fits = grid[0] % self.window == 0 and grid[1] % self.window == 0
        assert fits, f"windows of {self.window} do not divide a grid of {grid[0]}x{grid[1]}"
        return True

    def _window_mask(self, grid: Grid, device: torch.device) -> Tensor | None:
        """(windows of one picture, 1, n, n) bool."""
        if not self.shift:
            return None
        assert self.window is not None
        return shift_mask(grid, self.window, self.shift, device)[:, None]

    def _bias(self, grid: Grid | None) -> Tensor | None:
        """(H, n, n), or None."""
        if self.relative is None:
            return None
        bias: Tensor = self.relative(None if self._windowed(grid) else grid)
        return bias

    def _attend(self, x: Tensor, bias: Tensor | None, mask: Tensor | None, *, windows: int = 1) -> Tensor:
        """(B, n, D) -> (B, n, D); with `windows`, each of so many in turn has a row of the mask."""
        query, key, value = self._projections(x)
        scale, added = self._scale_and_bias(key, bias, mask)
        if windows > 1:
            # As more heads: what is added is then the same for all pictures, and need not be repeated.
            query, key, value = (
                rearrange(part, "(b w) h n c -> b (w h) n c", w=windows) for part in (query, key, value)
            )
            assert added is not None
            added = rearrange(added.expand(-1, self.num_heads, -1, -1), "w h i j -> 1 (w h) i j")
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=added, scale=scale)
        projected: Tensor = self.proj(rearrange(out, "b (w h) n c -> (b w) n (h c)", w=windows))
        return projected

    def _projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, n, C)."""
        if self.scores == "dot":
            assert self.key is not None
            rows = [layer(x) for layer in (self.query, self.key, self.value)]
            query, key, value = (rearrange(row, "b n (h c) -> b h n c", h=self.num_heads) for row in rows)
            return query, key, value
        weight = weight_of(self.query)  # (H C, D)
        query = rearrange(F.linear(x, weight), "b n (h c) -> b h n c", h=self.num_heads)
        if self.scores == "l2_tied":
            value = rearrange(self.value(x), "b n (h c) -> b h n c", h=self.num_heads)
            return query, query, value
        heads = rearrange(weight, "(h c) d -> h c d", h=self.num_heads)
        out = rearrange(weight_of(self.value), "(h c) d -> h c d", h=self.num_heads)
        # X W_q, W_q^T and W_v of each head in that order: nothing of the size D x D is needed for X.
        middle = torch.einsum("hcd,hed->hce", heads, out) * query.shape[-1] ** -0.5
        return query, query, torch.einsum("bhnc,hce->bhne", query, middle)

    def _scale_and_bias(
        self, key: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> tuple[float, Tensor | None]:
        """What q . k is multiplied by, and what is added to it: (B or 1, H or 1, n or 1, n)."""
        root = key.shape[-1] ** -0.5
        scale, added = root, None if bias is None else bias[None].to(key.dtype)
        if self.scores != "dot":
            # -|q - k|^2 = 2 q . k - |k|^2 - |q|^2, whose last part is the same for all keys.
            own = -root * key.square().sum(-1)[:, :, None, :]
            scale, added = 2 * root, own if added is None else own + added
        if mask is not None:
            if added is None:
                return scale, mask
            added = torch.where(mask, added, float("-inf"))
        return scale, added


class RelativeBias(nn.Module):
    """One learned number a head for each offset of two cells of a grid (Liu et al. 2021, 3.2)."""

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.grid = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(offsets, num_heads), std=0.02))

    def forward(self, grid: Grid | None = None) -> Tensor:
        """(H, n, n) for the n cells, in raster order, of a grid within that built for (None: that one)."""
        height, width = grid or self.grid
        known = height <= self.grid[0], width <= self.grid[1]
        assert all(known), f"a bias for {self.grid} lacks offsets of the cells of {grid}"
        cell = torch.arange(height * width, device=self.table.device)
        row, column = cell // width, cell % width
        down = row[:, None] - row[None, :] + self.grid[0] - 1
        right = column[:, None] - column[None, :] + self.grid[1] - 1
        return rearrange(self.table[down * (2 * self.grid[1] - 1) + right], "i j h -> h i j")
