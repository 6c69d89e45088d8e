"""Dense layers of one shape and several kinds of weight."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from taming.layers.equalised import EqualisedLinear
from taming.layers.spectral_norm import spectral_norm

LinearKind = Literal["plain", "equalised", "spectral", "improved_spectral"]


def make_linear(kind: LinearKind, in_features: int, out_features: int, bias: bool = True) -> nn.Module:
    """(..., in_features) -> (..., out_features), biases zero at the start.

    plain: weights from a normal of deviation 0.02, cut at two deviations, as vision transformers have them;
    equalised: see `equalised.py`; spectral and improved_spectral: Xavier weights whose spectral norm stays
    one, or what it was at the start.
    """
    if kind == "equalised":
        return EqualisedLinear(in_features, out_features, bias)
    linear = nn.Linear(in_features, out_features, bias)
    if bias:
        nn.init.zeros_(linear.bias)
    if kind == "plain":
        nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04)
        return linear
    nn.init.xavier_uniform_(linear.weight)
    return spectral_norm(linear, keep_initial=kind == "improved_spectral")


def weight_of(linear: nn.Module) -> Tensor:
    """The (out, in) matrix that an input of `linear` meets.

    Reading a spectrally normalised one in train mode moves its power iteration: read it once a forward.
    """
    weight = linear.effective_weight if isinstance(linear, EqualisedLinear) else linear.weight
    assert isinstance(weight, Tensor)
    return weight
