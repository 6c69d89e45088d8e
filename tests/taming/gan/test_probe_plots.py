"""Every figure is written, and without matplotlib the way out is said."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from taming.errors import UserError
from taming.gan import probe_plots


@pytest.mark.slow  # matplotlib and its fonts take seconds
def test_every_figure_is_a_picture(tmp_path: Path):
    probe_plots.plot_jacobian_norms(tmp_path / "deep" / "jacobian.png", [1, 10], {"dot": [1, 100.0]})
    probe_plots.plot_attention_distances(
        tmp_path / "far.png", [1, 2], {"raster": [1, 2.0]}, levels={"all": 3}
    )
    ratios = {"with": {"0.mlp": 2.0, "1.mlp": 3.0}, "without": {"0.mlp": 5.0, "1.mlp": 30.0}}
    probe_plots.plot_norm_ratios(tmp_path / "ratios.png", ratios, title="ratios")
    probe_plots.plot_sigmas(tmp_path / "sigmas.png", list(range(40)), {"conv": [1.0] * 40})
    maps = torch.rand(2, 3, 4, 4)
    queries = [(0.2, 0.2), (0.5, 0.5), (0.9, 0.1)]
    probe_plots.plot_attention_maps(tmp_path / "maps.png", torch.rand(2, 3, 16, 16), maps, queries, title="a")
    written = sorted(tmp_path.rglob("*.png"))
    assert len(written) == 5
    for path in written:
        with Image.open(path) as picture:
            assert picture.convert("L").getextrema() != (255, 255)


def test_without_matplotlib_the_way_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"taming-toolkit\[plots\]"):
        probe_plots.plot_sigmas(tmp_path / "sigmas.png", [0.0], {"conv": [1.0]})
