"""What the mechanisms of the GAN systems claim, measured: the figures of docs/gans.md.

    python benchmarks/gan_probes.py --out FOLDER [--steps N] [--only NAME ...] [--sagan MODEL]

    jacobian    norm of the Jacobian of dot-product, tied L2 and Kim's L2 attention, by the input's scale
    distance    how far attention looks: under local masks by their width, in Swin's windows, and everywhere
    ratio       |shortcut| / |branch| in STransGAN's discriminator, with and without projected shortcuts,
                at the start and after N steps against a generator
    sigma       singular values of SAGAN's discriminator over N steps: raw weights and normalised ones
    step        how far one step of Adam moves a weight, by its fan-in, plain, Xavier and equalised
    maps        where four places of pictures painted by a trained SAGAN look (with --sagan, a run or a model)

One PNG each and `probes.json` with their numbers; a couple of minutes on one core of a CPU with 300 steps.
Layers are small and of fixed seeds; the two trainings are on the built-in scenes at 32 px.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from taming.data.scenes import render_scene
from taming.gan.discriminators import build_discriminator
from taming.gan.discriminators.sagan import SAGANDiscriminatorConfig
from taming.gan.discriminators.stransgan import STransGANDiscriminatorConfig
from taming.gan.generators import build_generator
from taming.gan.generators.sagan import SAGANGeneratorConfig
from taming.gan.locality import local_mask
from taming.gan.losses import AdversarialLoss, discriminator_loss, generator_loss
from taming.gan.model import GANModel
from taming.gan.probe_plots import (
    plot_attention_distances,
    plot_attention_maps,
    plot_curves,
    plot_jacobian_norms,
    plot_norm_ratios,
    plot_sigmas,
)
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
from taming.layers.linears import make_linear, weight_of
from taming.layers.non_local import NonLocalBlock
from taming.layers.spectral_norm import spectral_norms
from taming.layers.token_attention import MultiHeadAttention, Scores

SIZE, PICTURES, BATCH = (32, 32), 1024, 16
Figures = dict[str, object]
MASKS: dict[str, Literal["raster", "window"]] = {
    "places in the raster": "raster",
    "rows and columns": "window",
}


def jacobian(out: Path, steps: int) -> Figures:
    """The largest over three kinds of input, four of each, scaled: random ones; random ones whose first token
    is zero, so that it looks at all alike, which is where dot products are steepest; and ones that grow
    where the first head's queries do not see it, which is where tied L2 is."""
    names: dict[str, Scores] = {"dot product": "dot", "L2, tied": "l2_tied", "L2, Kim et al.": "l2_kim"}
    scales = [10 ** (exponent / 2) for exponent in range(7)]
    norms: dict[str, list[float]] = {}
    for name, scores in names.items():
        torch.manual_seed(0)
        attention = MultiHeadAttention(16, 2, scores=scores).double().eval()
        for layer in (attention.query, attention.key, attention.value, attention.proj):
            if layer is not None:
                nn.init.orthogonal_(weight_of(layer))
        null = torch.linalg.svd(weight_of(attention.query)[:8].detach()).Vh[8:]  # (8, 16)
        near, far = torch.randn(2, 4, 1, 8, 16, dtype=torch.float64).unbind()
        blind, level = far @ null.mT @ null, far.clone()
        level[:, :, 0] = 0

        norms[name] = []
        for scale in scales:
            inputs = [scale * x for x in (*far, *level)]
            inputs += [x + scale * unseen for x, unseen in zip(near, blind, strict=True)]
            norms[name].append(max(jacobian_norm(attention, x) for x in inputs))
    title = "Attention of 8 tokens, width 16, 2 heads"
    plot_jacobian_norms(out / "jacobian.png", scales, norms, title=title)
    return {"scales": scales, "norms": norms}


def distance(out: Path, steps: int) -> Figures:
    """Of attention with fresh weights on a grid of 16 x 16, mean over heads."""
    torch.manual_seed(0)
    grid = (16, 16)
    x = torch.randn(4, 256, 64)
    attention = MultiHeadAttention(64, 4).eval()
    widths = [1, 2, 4, 6, 8, 10, 12, 15]

    def far(probabilities: Tensor, grid: tuple[int, int] = grid) -> float:
        return float(attention_distance(probabilities, grid).mean())

    with torch.no_grad():
        distances = {
            name: [far(attention.probabilities(x, mask=local_mask(grid, width, mode))) for width in widths]
            for name, mode in MASKS.items()
        }
        levels = {"no mask": far(attention.probabilities(x))}
        for window in (4, 8):
            swin = MultiHeadAttention(64, 4, window=window, shift=window // 2).eval()
            levels[f"Swin, window {window}"] = far(swin.probabilities(x, grid=grid), (window, window))
    title = "Fresh attention on 16 x 16 tokens"
    plot_attention_distances(out / "distance.png", widths, distances, levels=levels, title=title)
    return {"widths": widths, "distances": distances, "levels": levels}


def ratio(out: Path, steps: int) -> Figures:
    """Two discriminators of the same start, but for their shortcuts."""
    found: dict[str, dict[str, float]] = {}
    for name, skip in (("residual", "identity"), ("projected", "projection")):
        config = STransGANDiscriminatorConfig(
            stem_halvings=2, widths=(64, 64), depths=(2, 2), window=4, head_dim=64, skip=skip
        )
        torch.manual_seed(0)
        network = build_discriminator(config, size=SIZE)
        pictures = scenes()[:BATCH]

        def measure(network: nn.Module = network, pictures: Tensor = pictures) -> dict[str, float]:
            with torch.no_grad():
                ratios = norm_ratios(network, lambda: network(pictures))
            return {name.replace("stages.", "").replace(".blocks.", "."): r for name, r in ratios.items()}

        found[f"{name}, at the start"] = measure()
        compete(network, "non_saturating", 2e-3, steps)
        found[f"{name}, after {steps} steps"] = measure()
    plot_norm_ratios(out / "ratio.png", found, title="STransGAN's discriminator, 32 px")
    return {"ratios": found}


def sigma(out: Path, steps: int) -> Figures:
    """Of a middle layer, the last and the dense one."""
    torch.manual_seed(0)
    network = build_discriminator(
        SAGANDiscriminatorConfig(channels=16, multipliers=(2, 4, 6, 6), num_halvings=3), size=SIZE
    )
    norms = {name.removesuffix(".parametrizations.weight.0"): name for name in spectral_norms(network)}
    watched = ["blocks.1.conv1", "blocks.3.conv2", "head.linear"]
    assert all(name in norms for name in watched)
    at: list[float] = []
    found: dict[str, list[float]] = {}

    def look(step: int) -> None:
        if step % 10:
            return
        at.append(step)
        for name, value in sigmas(network).items():
            if name in watched:
                raw = network.get_parameter(f"{name}.parametrizations.weight.original")
                found.setdefault(f"{name}, raw", []).append(weight_sigma(raw))
                found.setdefault(f"{name}, normalised", []).append(value)

    compete(network, "hinge", 1e-3, steps, look)
    plot_sigmas(out / "sigma.png", at, found, title="SAGAN's discriminator against a generator, lr 1e-3")
    return {"steps": at, "sigmas": found}


def step(out: Path, steps: int) -> Figures:
    """One step of Adam of rate 0.002 from a random gradient."""
    fans = [2**exponent for exponent in range(4, 12)]
    found: dict[str, list[float]] = {"plain (0.02)": [], "Xavier": [], "equalised": []}
    for fan in fans:
        torch.manual_seed(0)
        layers = {
            "plain (0.02)": make_linear("plain", fan, 64, bias=False),
            "Xavier": nn.Linear(fan, 64, bias=False),
            "equalised": EqualisedLinear(fan, 64, bias=False),
        }
        nn.init.xavier_uniform_(weight_of(layers["Xavier"]))
        for name, layer in layers.items():
            optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3, betas=(0.0, 0.99))
            layer(torch.randn(32, fan)).square().mean().backward()
            (moved,) = relative_steps(nn.Sequential(layer), optimizer.step).values()
            found[name].append(moved)
    plot_curves(
        out / "step.png",
        fans,
        found,
        x_label="fan-in",
        y_label="|step| / |weight|",
        title="One step of Adam, learning rate 0.002",
        log_x=True,
        log_y=True,
    )
    return {"fan_in": fans, "relative_steps": found}


def maps(out: Path, model: str) -> Figures:
    """The generator's attention, one picture of each class or five of none."""
    painter = GANModel.from_pretrained(model)
    places = [(0.15, 0.5), (0.5, 0.25), (0.5, 0.6), (0.85, 0.8)]
    pictures: list[Tensor] = []
    found = record_attention(painter, lambda: pictures.append(painter.sample(5, seed=3, batch_size=5)))
    name, probabilities = next(iter(found.items()))  # (5, 1, N, M)
    height, width = painter.config.size
    cells = probabilities.shape[2]
    rows = round((cells * height / width) ** 0.5)
    columns = cells // rows
    queries = [int(y * rows) * columns + int(x * columns) for y, x in places]
    block = painter.get_submodule(name)
    assert isinstance(block, NonLocalBlock)
    keys = block.key_grid(rows, columns)
    weights = probabilities[:, 0, queries].unflatten(-1, keys)
    title = f"Where cells of {rows} x {columns} look (gamma {float(block.gamma.detach()):.2f})"
    plot_attention_maps(out / "maps.png", pictures[0], weights, places, title=title)
    distance = attention_distance(probabilities, (rows, columns), keys)
    return {"mean_distance": float(distance.mean()), "gamma": float(block.gamma.detach())}


def compete(
    network: nn.Module,
    loss: AdversarialLoss,
    learning_rate: float,
    steps: int,
    look: Callable[[int], None] | None = None,
) -> None:
    """Train a discriminator on the scenes against a small SAGAN generator; `look(step)` before each step."""
    torch.manual_seed(1)
    pictures = scenes()
    config = SAGANGeneratorConfig(channels=8, multipliers=(6, 4, 4, 2), noise_dim=64)
    generator = build_generator(config, size=SIZE)
    of_generator = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.0, 0.99))
    of_network = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.0, 0.99))
    for number in range(steps):
        if look is not None:
            look(number)
        real = pictures[torch.randint(len(pictures), (BATCH,))]
        fake = generator(torch.randn(BATCH, 64))
        logits = network(torch.cat((real, fake.detach())))
        of_network.zero_grad()
        discriminator_loss(logits[:BATCH], logits[BATCH:], loss).backward()
        of_network.step()
        of_generator.zero_grad()
        generator_loss(network(fake), loss).backward()
        of_generator.step()
    if look is not None:
        look(steps)


_cache: list[Tensor] = []


def scenes() -> Tensor:
    """(PICTURES, 3, H, W) in [-1, 1]."""
    if not _cache:
        pixels = np.stack([render_scene(0, index, SIZE).image for index in range(PICTURES)])
        _cache.append(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return _cache[0]


PROBES = {"jacobian": jacobian, "distance": distance, "ratio": ratio, "sigma": sigma, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=list(PROBES), default=list(PROBES))
    parser.add_argument("--sagan", help="a run of `taming gan train` of kind sagan, or its model")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Figures] = {}
    for name in arguments.only:
        start = time.perf_counter()
        results[name] = PROBES[name](arguments.out, arguments.steps)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.sagan is not None:
        results["maps"] = maps(arguments.out, arguments.sagan)
    (arguments.out / "probes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
