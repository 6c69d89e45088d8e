"""A copy of a transformer that is made for sampling: cast once, and its matrices laid out for reading.

On a CPU decoding is bound by reading the weights. Up to three fp32 rows torch's own Linear reads them at the
memory's speed; for more it falls to a half, and MKL's packed layout is the fastest, then oneDNN's. In bf16 it
is oneDNN's for any number of rows. 8-bit weights are read as such by up to four rows; for more, arithmetic
bounds torch's kernel, and the same rounded weights are kept in bf16.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from stage2_ar.block import GELUMLP
from stage2_ar.sampling.quantized_linear import Int8Linear, can_read_int8, dequantize_rows, quantize_rows
from stage2_ar.transformer import Transformer
from taming.errors import UserError

Weights = Literal["full", "int8"]
"""In what weights are kept for sampling: as the model's dtype has them, or in 8 bits."""

_PLAIN_ROWS = 3
_MKL_ROWS = 32
_INT8_ROWS = 4


def for_inference(
    transformer: Transformer, dtype: torch.dtype, rows: int, weights: Weights = "full"
) -> Transformer:
    """The transformer in eval mode and in `dtype`, for decoding `rows` sequences at a time.

    Guidance doubles the rows; other numbers of rows work, more slowly. Give the same dtype to the prefix, or
    leave it: it is cast. `weights` "int8" rounds all matrices to 8 bits and computes in bf16 whatever the
    `dtype`: other codes are drawn, at a quarter of fp32's bytes. Returns the transformer itself where nothing
    is to be changed, else a copy without gradients, which cannot be trained or saved, and which shares what
    it need not change. Where a machine has no packed layout the copy is a plain cast.
    Raises UserError for 8-bit weights on another device than a CPU.
    """
    weight = transformer.token_embedding.weight
    if weights == "int8":
        check_weights(weights, weight.device)
        dtype = torch.bfloat16
    layout = _layout(weight.device, dtype, rows)
    if layout is None and weights == "full" and dtype == weight.dtype and not transformer.training:
        return transformer
    prepared = _frozen(transformer).eval()
    if weights == "int8":
        _replace_linears(prepared, lambda linear: _in_8_bits(linear, rows))
    prepared.to(dtype)
    if layout is PackedLinear:
        for block in prepared.blocks:
            if isinstance(block.mlp, GELUMLP) and isinstance(block.mlp.up, nn.Linear):
                assert isinstance(block.mlp.down, nn.Linear)
                block.mlp = PackedGELUMLP(block.mlp.up, block.mlp.down, rows)
    if layout is not None:
        _replace_linears(prepared, lambda linear: layout(linear, rows))
    return prepared


def check_weights(weights: str, device: torch.device) -> None:
    """Raises UserError for weights that are unknown, or that this device cannot sample with."""
    if weights not in get_args(Weights):
        raise UserError(f"weights {weights!r} are unknown; choose {' or '.join(get_args(Weights))}")
    if weights == "int8" and device.type != "cpu":
        raise UserError(
            f"8-bit weights are for sampling on a CPU, the model is on {device}; use bfloat16 there"
        )


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine and this build of torch have oneDNN's packed layout."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not all(hasattr(operators, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def can_pack_mkl(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has MKL's packed layout; it is of fp32 alone."""
    if device.type != "cpu" or dtype != torch.float32 or not torch.backends.mkl.is_available():
        return False
    return all(hasattr(torch.ops.mkl, name) for name in ("_mkl_linear", "_mkl_reorder_linear_weight"))


class PackedLinear(nn.Module):
    """A Linear for inference on a CPU whose weight was reordered once by oneDNN.

    These are the operators that torch.compile's freezing uses; `can_pack` says whether they are there.
    """

    def __init__(self, linear: nn.Linear, rows: int, activation: str = "none") -> None:
        super().__init__()
        # "gelu" with the algorithm "none" is the exact one.
        self.activation, self.algorithm = activation, "none" if activation == "gelu" else ""
        # Plain attributes: an opaque tensor is neither a parameter nor something to save.
        with torch.inference_mode(False), torch.no_grad():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, self.activation, [], self.algorithm
        )
        return out


class PackedGELUMLP(nn.Module):
    """GELUMLP with its activation inside the first product."""

    def __init__(self, up: nn.Linear, down: nn.Linear, rows: int) -> None:
        super().__init__()
        self.up, self.down = PackedLinear(up, rows, "gelu"), PackedLinear(down, rows)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out


class MKLLinear(nn.Module):
    """A Linear for inference on a CPU whose fp32 weight was packed once by MKL, for one number of rows.

    Any other number of rows is multiplied by the weight as it was.
    """

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = linear.weight.detach().contiguous()
        with torch.inference_mode(False), torch.no_grad():
            self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)
        return out


Layout = Callable[[nn.Linear, int], nn.Module]


def _layout(device: torch.device, dtype: torch.dtype, rows: int) -> Layout | None:
    """How matrices are best kept for this many rows; None: as they are."""
    if dtype == torch.float32 and rows <= _PLAIN_ROWS:
        return None
    if rows <= _MKL_ROWS and can_pack_mkl(device, dtype):
        return MKLLinear
    return PackedLinear if can_pack(device, dtype) else None


def _in_8_bits(linear: nn.Linear, rows: int) -> nn.Module:
    """A Linear with rounded weights: in 8 bits where that is the faster, else widened again."""
    if rows <= _INT8_ROWS and can_read_int8(linear.weight.device, linear):
        return Int8Linear(linear)
    rounded = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    rounded.weight = nn.Parameter(dequantize_rows(*quantize_rows(linear.weight)), requires_grad=False)
    if linear.bias is not None:
        rounded.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
    return rounded


def _frozen(transformer: Transformer) -> Transformer:
    """A copy whose parameters share the original's memory and take no gradients."""
    known: dict[int, object] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in transformer.parameters()
    }
    if transformer._compiled is not None:
        known[id(transformer._compiled)] = None  # of training alone, and nothing to copy
    return copy.deepcopy(transformer, known)


def _replace_linears(transformer: Transformer, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    linears = [
        (name, module) for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
    ]
    for name, linear in linears:
        parent, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(parent), attribute, replacement(linear))
