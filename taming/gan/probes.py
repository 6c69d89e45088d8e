"""What the mechanisms of the GAN systems claim, as numbers: how far attention looks, which half of a block
speaks, how steep a layer is, how large a weight and its steps are. `probe_plots.py` draws them.

Axes: B pictures, H heads, N queries, M keys, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from taming.layers.equalised import EqualisedConv2d, EqualisedLinear
from taming.layers.non_local import NonLocalBlock
from taming.layers.spectral_norm import spectral_norms, still
from taming.layers.token_attention import MultiHeadAttention
from taming.layers.token_block import TokenBlock

Grid = tuple[int, int]
EXACT_ENTRIES = 2**18
"""Up to so many entries, a Jacobian is written out and decomposed."""
CONVERGED = 1e-6
"""Relative change of a norm between two iterations that ends them."""
WEIGHTED = (nn.Linear, nn.Conv2d, nn.Embedding, EqualisedLinear, EqualisedConv2d)


def attention_distance(probabilities: Tensor, grid: Grid, key_grid: Grid | None = None) -> Tensor:
    """Mean distance in cells between a query and what it looks at (Dosovitskiy et al. 2021, Fig. 7).

    `probabilities` (B, H, N, M), rows that sum to one, over the cells of `grid` in raster order -> (H,).
    `key_grid` is the coarser grid of pooled keys, whose places are the middles of the cells that they pool.
    For attention in windows, give windows as pictures and the window as the grid.
    """
    places = _places(grid, grid).to(probabilities)
    keys = places if key_grid is None else _places(key_grid, grid).to(probabilities)
    distances = (places[:, None] - keys[None, :]).norm(dim=-1)  # (N, M)
    return torch.einsum("bhnm,nm->h", probabilities, distances) / probabilities[:, 0, :, 0].numel()


def jacobian_norm(
    function: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 100, seed: int = 0
) -> float:
    """Largest singular value of the Jacobian of `function` at `x`, tensors of any shape.

    How much the steepest direction at x grows: a lower bound of the Lipschitz constant. Small Jacobians are
    decomposed, of large ones a power iteration finds it, from below. Modules whose forward moves something
    (spectral norm, batch statistics) are to be in eval mode.
    """
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():  # the only attention that differentiates twice
        if function(x).numel() * x.numel() <= EXACT_ENTRIES:
            jacobian = torch.autograd.functional.jacobian(function, x).detach()
            return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))
        out = function(x)
        # J^T w is linear in w: its gradient along v is J v, without derivatives in forward mode.
        weights = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, x, weights, create_graph=True)
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(x.shape, generator=generator).to(x)
        norm = 0.0
        for _ in range(iterations):
            direction = direction / direction.norm().clamp_min(torch.finfo(x.dtype).tiny)
            (along,) = torch.autograd.grad(pulled, weights, direction, retain_graph=True)
            (direction,) = torch.autograd.grad(out, x, along, retain_graph=True)
            before, norm = norm, float(along.norm())
            if abs(norm - before) <= CONVERGED * norm:
                break
        return norm


def weight_sigma(weight: Tensor) -> float:
    """Largest singular value of a weight, seen as (out, all other axes)."""
    return float(torch.linalg.matrix_norm(weight.detach().flatten(1).float(), 2))


def sigmas(model: nn.Module) -> dict[str, float]:
    """Layer -> largest singular value of the weight that its input meets, of all with a spectral norm.

    Nothing moves: the power iterations are those of the last forward.
    """
    found = {}
    with torch.no_grad(), still(model):
        for name in spectral_norms(model):
            layer, _, parameter = name.removesuffix(".0").rpartition("parametrizations.")
            layer = layer.removesuffix(".")
            found[layer or "(itself)"] = weight_sigma(getattr(model.get_submodule(layer), parameter))
    return found


def relative_steps(model: nn.Module, step: Callable[[], object]) -> dict[str, float]:
    """Layer -> length of what `step()` adds to the weight that the input meets, over that weight's length.

    `step` is an optimiser's, or many. Of an equalised layer the weight is the scaled one, of a normalised
    one the normalised.
    """
    before = _effective_weights(model)
    step()
    after = _effective_weights(model)
    return {
        name: float((after[name] - weight).norm() / weight.norm())
        for name, weight in before.items()
        if weight.norm() > 0
    }


def record_attention(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Name -> probabilities of every attention of `model` that runs while `run()` does, on the CPU.

    (B, H, N, N) of a MultiHeadAttention, with windows (B windows, H, n, n); (B, 1, N, M) of a NonLocalBlock.
    They are computed once more from the same input, and no power iteration moves for it. Of one that runs
    several times the last counts.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
            with torch.no_grad(), still(module):
                found[name] = module.probabilities(*args, **kwargs).cpu()

        return hook

    # After the forward: its power iteration has moved, and that is the weight it used.
    handles = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, MultiHeadAttention | NonLocalBlock)
    ]
    return _run_hooked(run, handles, found)


def norm_ratios(model: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Half of a block -> |shortcut| / |branch| while `run()` runs (STransGAN, Xu et al. 2021).

    The names are those of the TokenBlocks with ".attention" or ".mlp" behind. The shortcut is what is added,
    after its projection where it has one; lengths are of all tokens of all pictures together.
    """
    lengths: dict[tuple[str, str], Tensor] = {}

    def watch(half: str, part: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> None:
            lengths[half, part] = out.detach().float().norm()

        return hook

    handles = []
    for name, block in model.named_modules():
        if isinstance(block, TokenBlock):
            for half, skip, act in (
                ("attention", block.skip1, block.act1),
                ("mlp", block.skip2, block.act2),
            ):
                full = f"{name}.{half}" if name else half
                handles += [
                    skip.register_forward_hook(watch(full, "shortcut")),
                    act.register_forward_hook(watch(full, "branch")),
                ]
    _run_hooked(run, handles, lengths)
    halves = dict.fromkeys(half for half, _ in lengths)
    return {half: float(lengths[half, "shortcut"] / lengths[half, "branch"]) for half in halves}


def _run_hooked(run: Callable[[], object], handles: list[Any], found: dict[Any, Tensor]) -> dict[Any, Tensor]:
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _effective_weights(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    with torch.no_grad(), still(model):
        for name, module in model.named_modules():
            if isinstance(module, WEIGHTED):
                equalised = isinstance(module, EqualisedLinear | EqualisedConv2d)
                weight = module.effective_weight if equalised else module.weight
                assert isinstance(weight, Tensor)
                found[name] = weight.detach().clone()
    return found


def _places(grid: Grid, within: Grid) -> Tensor:
    """(cells, 2): middles of the cells of `grid` in raster order, in cells of `within`."""
    rows, columns = (
        (torch.arange(count) + 0.5) * (size / count) for count, size in zip(grid, within, strict=True)
    )
    return torch.cartesian_prod(rows, columns)
