"""Figures of `probes.py`: each function writes one PNG.

All raise UserError where matplotlib, which is an extra, is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from taming.data.picture import to_uint8
from taming.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120


def plot_curves(
    path: Path,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Named curves over one axis, and named horizontal `levels` to hold them against."""
    figure, axes = _figure(6.4, 4.0)
    for name, values in curves.items():
        axes.plot(x, values, marker="o" if len(x) < 30 else None, markersize=3.5, label=name)
    for number, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{len(curves) + number}", label=name)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    _finish(path, figure, axes, x_label, y_label, title)


def plot_bars(
    path: Path,
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    title: str = "",
    log_y: bool = False,
) -> None:
    """One bar of every group for each of `names`, side by side."""
    figure, axes = _figure(max(6.4, 1.0 + 0.55 * len(names)), 4.0)
    width = 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        offset = (number - (len(groups) - 1) / 2) * width
        axes.bar(np.arange(len(names)) + offset, values, width, label=group)
    axes.set_xticks(np.arange(len(names)), names, rotation=35, ha="right", fontsize=8)
    if log_y:
        axes.set_yscale("log")
    _finish(path, figure, axes, "", y_label, title)


def plot_jacobian_norms(
    path: Path, scales: Sequence[float], norms: Mapping[str, Sequence[float]], *, title: str = ""
) -> None:
    """`jacobian_norm` of each layer over the scale of its input, both axes logarithmic."""
    plot_curves(
        path,
        scales,
        norms,
        x_label="scale of the input",
        y_label="norm of the Jacobian",
        title=title,
        log_x=True,
        log_y=True,
    )


def plot_attention_distances(
    path: Path,
    widths: Sequence[float],
    distances: Mapping[str, Sequence[float]],
    *,
    levels: Mapping[str, float] | None = None,
    title: str = "",
) -> None:
    """`attention_distance` over the width of a local mask; `levels` are those of other attentions."""
    plot_curves(
        path,
        widths,
        distances,
        x_label="width of the mask (cells)",
        y_label="mean distance attended to (cells)",
        title=title,
        levels=levels,
    )


def plot_norm_ratios(path: Path, ratios: Mapping[str, Mapping[str, float]], *, title: str = "") -> None:
    """`norm_ratios` of several models, named, whose halves of blocks have the same names."""
    names = list(next(iter(ratios.values())))
    groups = {model: [found[name] for name in names] for model, found in ratios.items()}
    plot_bars(path, names, groups, y_label="|shortcut| / |branch|", title=title, log_y=True)


def plot_sigmas(
    path: Path, steps: Sequence[float], found: Mapping[str, Sequence[float]], *, title: str = ""
) -> None:
    """Largest singular values of weights over the steps of a training."""
    plot_curves(
        path,
        steps,
        found,
        x_label="step",
        y_label="largest singular value",
        title=title,
        log_y=True,
        levels={"one": 1.0},
    )


def plot_attention_maps(
    path: Path, images: Tensor, maps: Tensor, queries: Sequence[tuple[float, float]], *, title: str = ""
) -> None:
    """Where queries look: a row a picture, the picture with the queries marked, then a column a query.

    `images` (B, 3, H, W) in [-1, 1]; `maps` (B, Q, h, w), the weights of all keys for each of the Q
    `queries`, which are places (y, x) in [0, 1].
    """
    pictures = rearrange(to_uint8(images), "b c h w -> b h w c").cpu().numpy()
    height, width = pictures.shape[1:3]
    large = F.interpolate(maps.float().cpu(), (height, width), mode="bilinear").numpy()
    figure = _new_figure(1.3 * (len(queries) + 1), 1.3 * len(pictures) + (0.4 if title else 0))
    grid = figure.subplots(len(pictures), len(queries) + 1, squeeze=False)
    for row, picture in enumerate(pictures):
        grid[row, 0].imshow(picture)
        for number, (y, x) in enumerate(queries):
            place = (x * width - 0.5, y * height - 0.5)
            grid[row, 0].plot(*place, "o", color=f"C{number}", markeredgecolor="white", markersize=5)
            grid[row, number + 1].imshow(picture.mean(-1), cmap="gray", alpha=0.6)
            grid[row, number + 1].imshow(large[row, number], cmap="inferno", alpha=0.65)
            grid[row, number + 1].plot(*place, "o", color=f"C{number}", markeredgecolor="white", markersize=5)
    for axes in grid.flat:
        axes.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=9)
    _save(path, figure)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = _new_figure(width, height)
    return figure, figure.add_subplot()


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure as NewFigure
    except ImportError:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install 'taming-toolkit[plots]'"
        ) from None
    return NewFigure(figsize=(width, height), layout="constrained")


def _finish(path: Path, figure: Figure, axes: Axes, x_label: str, y_label: str, title: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if title:
        axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    _save(path, figure)


def _save(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
