"""Attention against loops, in every form; its windows; blocks, norms and heads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.gan.heads import ProjectionHead, TokenHead
from taming.layers.linears import weight_of
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import PixelNorm, TokenLayerNorm
from taming.layers.upsampling import resize_tokens, shuffle_tokens
from taming.layers.windows import from_windows, shift_mask, to_windows

HEADS, WIDTH = 2, 6


def attention(**options: Any) -> MultiHeadAttention:
    torch.manual_seed(0)
    found = MultiHeadAttention(WIDTH, HEADS, **options)
    for parameter in found.parameters():
        nn.init.normal_(parameter)
    return found.eval()


def looped(layer: MultiHeadAttention, x: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """Token by token as the papers have it: x (N, D), seen (N, N) bool, bias (H, N, N)."""
    size = WIDTH // HEADS
    out = torch.zeros(len(x), WIDTH)
    queries, values = weight_of(layer.query).split(size), weight_of(layer.value).split(size)
    for head in range(HEADS):
        w_q = queries[head]
        w_k = w_q if layer.key is None else weight_of(layer.key).split(size)[head]
        inner = values[head]
        if layer.scores == "l2_kim":
            inner = inner @ (w_q.T @ w_q / size**0.5)
        for i in range(len(x)):
            scores = []
            for j in range(len(x)):
                q, k = w_q @ x[i], w_k @ x[j]
                score = q @ k if layer.scores == "dot" else -(q - k).square().sum()
                score = score / size**0.5 + (0 if bias is None else bias[head, i, j])
                scores.append(score if seen[i, j] else torch.tensor(float("-inf")))
            out[i, head * size : (head + 1) * size] = torch.stack(scores).softmax(0) @ (x @ inner.T)
    return layer.proj(out)


@pytest.mark.parametrize("linear", ["plain", "equalised", "improved_spectral"])
@pytest.mark.parametrize("scores", ["dot", "l2_tied", "l2_kim"])
def test_it_is_the_loop(scores: Any, linear: Any):
    layer = attention(scores=scores, linear=linear, relative_grid=(2, 3))
    x, seen = torch.randn(1, 6, WIDTH), torch.ones(6, 6, dtype=torch.bool).tril(2)
    bias = layer.relative()
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], looped(layer, x[0], seen | True, bias), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            layer(x, mask=seen)[0], looped(layer, x[0], seen, bias), rtol=1e-4, atol=1e-4
        )
        found = layer.probabilities(x, mask=seen)
    assert not found[0, :, ~seen].any()
    torch.testing.assert_close(found.sum(-1), torch.ones(1, HEADS, 6))


@pytest.mark.parametrize("grid", [(8, 4), (4, 12), (8, 8)])
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_attend_to_their_cells_of_the_picture(grid: tuple[int, int], shift: int):
    layer = attention(window=4, shift=shift, relative_grid=(16, 16))
    x = torch.randn(1, grid[0] * grid[1], WIDTH)
    cells = list(itertools.product(range(grid[0]), range(grid[1])))

    def window(cell: tuple[int, int]) -> tuple[int, int]:
        # Windows of the moved grid, those at the ends cut where the picture ends; one window is not moved.
        down, right = (shift if side > 4 else 0 for side in grid)
        return (cell[0] + 4 - down) // 4, (cell[1] + 4 - right) // 4

    seen = torch.tensor([[window(a) == window(b) for b in cells] for a in cells])
    bias = torch.zeros(HEADS, len(cells), len(cells))
    for (i, a), (j, b) in itertools.product(enumerate(cells), repeat=2):
        down, right = a[0] - b[0], a[1] - b[1]
        if abs(down) < 4 and abs(right) < 4:
            bias[:, i, j] = layer.relative.table[(down + 3) * 7 + right + 3]
    with torch.no_grad():
        torch.testing.assert_close(
            layer(x, grid=grid)[0], looped(layer, x[0], seen, bias), rtol=1e-4, atol=1e-4
        )


def test_a_map_no_larger_than_a_window_is_not_shifted():
    shifted, plain = attention(window=4, shift=2), attention()
    x = torch.randn(2, 16, WIDTH)
    torch.testing.assert_close(shifted(x, grid=(4, 4)), plain(x))


@pytest.mark.parametrize("scores", ["dot", "l2_tied"])
@pytest.mark.parametrize("relative_grid", [None, (4, 4)])
def test_windows_of_several_pictures_are_those_of_each(scores: Any, relative_grid: Any):
    layer = attention(window=4, shift=2, scores=scores, relative_grid=relative_grid)
    x = torch.randn(3, 96, WIDTH)
    alone = torch.cat([layer(picture, grid=(8, 12)) for picture in x.split(1)])
    torch.testing.assert_close(layer(x, grid=(8, 12)), alone)
    values = layer.value(to_windows(x, (8, 12), 4, 2)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    looked = (layer.probabilities(x, grid=(8, 12)) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(from_windows(layer.proj(looked), (8, 12), 4, 2), alone, rtol=1e-4, atol=1e-5)


def test_windows_and_back():
    x = torch.randn(2, 48, 3)
    assert torch.equal(from_windows(to_windows(x, (8, 6), 2, 1), (8, 6), 2, 1), x)
    assert shift_mask((8, 8), 4, 0).all()
    assert shift_mask((8, 8), 4, 2)[0].all()


@pytest.mark.parametrize("scores", ["dot", "l2_kim"])
def test_it_can_be_differentiated_twice(scores: Any):
    layer = attention(scores=scores, linear="spectral", window=4, shift=2, relative_grid=(8, 8)).train()
    x = torch.randn(2, 64, WIDTH, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(layer(x, grid=(8, 8)).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_block_is_its_two_halves():
    torch.manual_seed(0)
    block = TokenBlock(
        MultiHeadAttention(8, 2), TokenMLP(8, 16), TokenLayerNorm(8), PixelNorm(),
        skip1=nn.Linear(8, 8), branch_activation=nn.Tanh, trunk_norm=TokenLayerNorm(8),
    )  # fmt: skip
    x = torch.randn(2, 9, 8)
    half = block.trunk_norm(block.skip1(x) + torch.tanh(block.attention(block.norm1(x))))
    normed = half / (half.square().mean(-1, keepdim=True) + 1e-8).sqrt()
    torch.testing.assert_close(block(x), half + torch.tanh(block.mlp(normed)))


def test_tokens_upsample_as_maps_do():
    x = torch.randn(2, 12, 8)
    cells = x.transpose(1, 2).reshape(2, 8, 3, 4)
    shuffled, grid = shuffle_tokens(x, (3, 4))
    assert grid == (6, 8)
    torch.testing.assert_close(shuffled.transpose(1, 2).reshape(2, 2, 6, 8), torch.pixel_shuffle(cells, 2))
    larger, _ = resize_tokens(x, (3, 4), (6, 8), "bicubic")
    wanted = nn.functional.interpolate(cells, scale_factor=2, mode="bicubic")
    torch.testing.assert_close(larger.transpose(1, 2).reshape(2, 8, 6, 8), wanted)


@pytest.mark.parametrize("linear", ["plain", "equalised", "spectral"])
def test_heads(linear: Any):
    torch.manual_seed(0)
    head, h, y = ProjectionHead(8, 3, linear).eval(), torch.randn(2, 8), torch.tensor([0, 2])
    table = head.embed.weight * head.gain
    torch.testing.assert_close(head(h, y)[:, 0], head.linear(h)[:, 0] + (table[y] * h).sum(1))
    assert not torch.equal(head(h, y), head(h, 1 - y // 2))
    alone = ProjectionHead(8, None, linear).eval()
    torch.testing.assert_close(alone(h, y), alone(h))
    tokens = torch.randn(2, 6, 8)
    logits = TokenHead(8, linear).eval()(tokens, (2, 3))
    assert logits.shape == (2, 1, 2, 3)
