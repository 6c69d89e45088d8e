"""Probes against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from taming.gan.locality import local_mask
from taming.gan.probes import (
    attention_distance,
    jacobian_norm,
    norm_ratios,
    record_attention,
    relative_steps,
    sigmas,
    weight_sigma,
)
from taming.layers.equalised import EqualisedLinear
from taming.layers.linears import make_linear
from taming.layers.non_local import NonLocalBlock
from taming.layers.spectral_norm import SpectralConv2d
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock, TokenMLP
from taming.layers.token_norm import NoNorm, TokenLayerNorm


def test_attention_distance_of_uniform_and_of_one_place():
    """Uniform over a 2 x 2 grid: the mean of 0, 1, 1 and the root of 2."""
    uniform = torch.full((3, 2, 4, 4), 0.25)
    uniform[:, 1] = torch.eye(4)  # the second head looks at the cell itself
    found = attention_distance(uniform, (2, 2))
    torch.testing.assert_close(found, torch.tensor([(2 + math.sqrt(2)) / 4, 0.0]))
    row = torch.zeros(1, 1, 6, 6)
    row[..., 0] = 1  # all look at the first cell of 2 rows and 3 columns
    wanted = sum(math.hypot(i, j) for i in range(2) for j in range(3)) / 6
    torch.testing.assert_close(attention_distance(row, (2, 3)), torch.tensor([wanted]))


def test_attention_looks_as_far_as_masks_and_windows_let_it():
    torch.manual_seed(0)
    attention, x, grid = MultiHeadAttention(8, 2), torch.randn(2, 64, 8), (8, 8)
    distances = [
        attention_distance(attention.probabilities(x, mask=local_mask(grid, width, mode)), grid)
        for mode in ("window", "raster")
        for width in (1, 2, 4)
    ]
    everywhere = attention_distance(attention.probabilities(x), grid)
    for narrow, wide in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert (distances[narrow] < distances[wide]).all()
    assert (distances[2] < everywhere).all()
    windowed = MultiHeadAttention(8, 2, window=4, shift=2)
    near = attention_distance(windowed.probabilities(x, grid=grid), (4, 4))
    assert (near <= 3 * math.sqrt(2)).all()  # a window's diameter
    assert (near < everywhere).all()


def test_attention_distance_to_pooled_keys():
    """The one key of a 2 x 2 map lies in its middle, half a diagonal from each cell."""
    found = attention_distance(torch.ones(1, 1, 4, 1), (2, 2), (1, 1))
    torch.testing.assert_close(found, torch.tensor([math.sqrt(0.5)]))


@pytest.mark.parametrize("size", [8, 600], ids=["decomposed", "iterated"])
def test_jacobian_norm_of_a_diagonal_map(size: int):
    scales = torch.linspace(-3, 2, size)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert jacobian_norm(lambda v: scales * v, x) == pytest.approx(3, rel=1e-2)
    # d(v^3 / 3) is diag(v^2).
    wanted = float(x.square().max())
    assert jacobian_norm(lambda v: v**3 / 3, x) == pytest.approx(wanted, rel=1e-2)


def test_iterated_and_decomposed_jacobians_agree_through_attention(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, scores="l2_kim")
    x = torch.randn(1, 6, 8)
    exact = jacobian_norm(attention, x)
    monkeypatch.setattr("taming.gan.probes.EXACT_ENTRIES", 0)
    assert jacobian_norm(attention, x) == pytest.approx(exact, rel=1e-2)


def test_sigma_of_known_weights():
    weight = torch.zeros(3, 2, 1, 2)
    weight.view(3, 4)[0, 0], weight.view(3, 4)[1, 2] = -5, 2
    assert weight_sigma(weight) == pytest.approx(5)
    model = nn.Sequential(SpectralConv2d(2, 3, 3), nn.Linear(3, 3), make_linear("spectral", 4, 4))
    for _ in range(50):
        for index in (0, 2):
            _ = model[index].weight
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(5)  # which the norm does not see
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = sigmas(model)
    assert found.keys() == {"0", "2"}
    assert list(found.values()) == pytest.approx([1, 1], abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sigmas(model[2]).keys() == {"(itself)"}


def test_relative_steps_of_one_sign_step():
    """Every entry of the raw weight moves by lr: relative to N(0, 1) weights, by lr in each layer alike."""
    torch.manual_seed(0)
    model = nn.Sequential(EqualisedLinear(16, 64), EqualisedLinear(64, 8), nn.Linear(8, 8, bias=False))

    def step() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)

    found = relative_steps(model, step)
    assert [found["0"], found["1"]] == pytest.approx([0.01, 0.01], rel=0.1)
    root_mean = 1 / math.sqrt(3 * 8)  # of the usual uniform weights
    assert found["2"] == pytest.approx(0.01 / root_mean, rel=0.2)


def test_record_attention_sees_every_attention_of_a_run():
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.look = NonLocalBlock(8)
            self.windowed = MultiHeadAttention(8, 2, window=2, shift=1, linear="spectral")

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.look(x).flatten(2).mT
            return self.windowed(tokens, grid=(4, 4))

    model, x = Both(), torch.randn(2, 8, 4, 4)
    seen: list[Tensor] = []
    found = record_attention(model, lambda: seen.append(model(x)))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "look": (2, 1, 16, 4),
        "windowed": (8, 2, 4, 4),
    }
    after = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()  # the weights of the last forward in train mode
    torch.testing.assert_close(found["look"], model.look.probabilities(x))
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    assert not model.look._forward_hooks
    distance = attention_distance(found["windowed"], (2, 2))
    assert (distance <= math.sqrt(2)).all()  # no farther than a window's diagonal


def test_norm_ratios_of_known_halves():
    """Shortcuts times 4 and 3; the branch of attention is its input, that of the MLP twice its input."""

    class Times(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
            return self.factor * x

    attention, mlp = MultiHeadAttention(4, 1), TokenMLP(4, 4)
    block = TokenBlock(attention, mlp, NoNorm(), NoNorm(), skip1=Times(4), skip2=Times(3))
    block.attention, block.mlp = Times(1), Times(2)  # type: ignore[assignment]
    model = nn.Sequential(block)
    ratios = norm_ratios(model, lambda: model(torch.randn(2, 5, 4)))
    assert ratios == {"0.attention": pytest.approx(4), "0.mlp": pytest.approx(1.5)}
    plain = TokenBlock(attention, mlp, TokenLayerNorm(4), TokenLayerNorm(4))
    assert norm_ratios(plain, lambda: plain(torch.randn(2, 5, 4))).keys() == {"attention", "mlp"}
