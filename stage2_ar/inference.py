"""A copy of a transformer that is made for sampling: cast once, and its matrices laid out for reading.

On a CPU decoding is bound by reading the weights. For a handful of rows torch's own Linear reads a large
matrix at a third to a half of the memory's speed; oneDNN's prepacked layout reads it at nearly all of it. A
single fp32 row is read at full speed as it is.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stage2_ar.transformer import GELUMLP, Transformer


def for_inference(transformer: Transformer, dtype: torch.dtype, rows: int) -> Transformer:
    """The transformer in eval mode and in `dtype`, for decoding `rows` sequences at a time.

    Guidance doubles the rows. Give the same dtype to the prefix, or leave it: it is cast. Returns the
    transformer itself where nothing is to be changed, else a copy without gradients, which cannot be
    trained or saved. Where oneDNN has no packed layout the copy is a plain cast.
    """
    weight = transformer.token_embedding.weight
    pack = can_pack(weight.device, dtype) and (rows > 1 or dtype != torch.float32)
    if not pack and dtype == weight.dtype and not transformer.training:
        return transformer
    prepared = copy.deepcopy(transformer).eval().requires_grad_(False).to(dtype)
    if pack:
        for block in prepared.blocks:
            if isinstance(block.mlp, GELUMLP):
                block.mlp = PackedGELUMLP(block.mlp, rows)
        linears = [
            (name, module) for name, module in prepared.named_modules() if isinstance(module, nn.Linear)
        ]
        for name, linear in linears:
            parent, _, attribute = name.rpartition(".")
            setattr(prepared.get_submodule(parent), attribute, PackedLinear(linear, rows))
    return prepared


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine and this build of torch have the packed layout."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not all(hasattr(operators, name) for name in ("_linear_pointwise", "_reorder_linear_weight")):
        return False
    if dtype == torch.bfloat16:
        return bool(operators._is_mkldnn_bf16_supported())
    return dtype == torch.float32


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

    def __init__(self, mlp: GELUMLP, rows: int) -> None:
        super().__init__()
        self.up, self.down = PackedLinear(mlp.up, rows, "gelu"), PackedLinear(mlp.down, rows)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x))
        return out
