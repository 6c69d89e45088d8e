"""What single mechanisms of the four GAN systems give: each system with and without them, for the same time.

    python benchmarks/gan_ablations.py [--minutes 4] [--at-once 1] [--seeds 1] [--pairs NAME ...] [--out F]

On the scenes at 32 px by class, from configs/gan/NAME_small.yaml with the changes below, on one thread each.
Runs that are in F already are not made again. The feature distance is that of 1000 samples of the saved
(averaged) model to 1000 validation scenes; the best one is of the evaluations on the way, of 256 pictures,
where a run that gets worse again shows. Writes F/gan_ablations.md and gan_ablations.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from gan_runs import drawn, facts, make_runs, read, run_folder, table, train_for, written

from taming.config import load_config
from taming.data.config import ScenesDataConfig
from taming.gan.config import GANTrainConfig
from taming.gan.model import GANModel
from taming.metrics.feature_distance import feature_distance

DATA = {"kind": "scenes", "size": 32, "num_train": 8000, "num_validation": 256}
MEASURED = 1000
FEW = "data.num_train=400"


@dataclass(frozen=True)
class Pair:
    """One mechanism: a config, and the changes with and without it."""

    config: str
    without: tuple[str, ...]
    having: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    """Changes of either side."""


PAIRS: dict[str, Pair] = {
    "SAGAN: attention": Pair(
        "sagan_small", ("generator.attention.resolutions=[]", "discriminator.attention.resolutions=[]")
    ),
    # One rate for both players: the geometric mean of the two.
    "SAGAN: two time-scales": Pair(
        "sagan_small",
        ("generator_optimizer.learning_rate=5e-4", "discriminator_optimizer.learning_rate=5e-4"),
    ),
    "TransGAN: DiffAugment": Pair("transgan_small", ("augment=[]",)),
    "TransGAN: DiffAugment, 400 pictures": Pair(
        "transgan_small", ("augment=[]",), ("augment=[color,translation,cutout]",), (FEW,)
    ),
    "TransGAN: translation alone, 400 pictures": Pair(
        "transgan_small", ("augment=[]",), ("augment=[translation]",), (FEW,)
    ),
    "ViTGAN: L2 attention (or dot product)": Pair("vitgan_small", ("discriminator.scores=dot",)),
    "ViTGAN: improved spectral norm (or plain)": Pair("vitgan_small", ("discriminator.linear=spectral",)),
    "STransGAN: skip projection": Pair("stransgan_small", ("discriminator.skip=identity",)),
}


def run_name(config: str, overrides: Sequence[str], seed: int) -> str:
    """Runs that two pairs share are made once."""
    return " ".join((config, *overrides, f"seed={seed}"))


def sides(pair: Pair) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Overrides with the mechanism, and without."""
    return (*pair.both, *pair.having), (*pair.both, *pair.without)


def train_one(name: str, out: Path, minutes: float) -> None:
    """The run of that name, measured at its end."""
    config_name, *overrides, seed = name.split(" ")
    given = [f"data.{key}={value}" for key, value in DATA.items()]
    given += [*overrides, f"training.{seed}"]
    config = load_config(GANTrainConfig, config_name, given, group="gan")
    folder = run_folder(out, name)
    figures = train_for(config, folder, minutes)
    validation = drawn(ScenesDataConfig(size=32, num_validation=MEASURED), "validation")
    batch = validation.batch(range(MEASURED), [-1] * MEASURED)
    real, labels = batch["image"].float() / 127.5 - 1, batch["label"].tolist()
    images = GANModel.from_pretrained(folder / "run").sample(MEASURED, classes=labels, batch_size=32)
    written(folder, {**figures, "name": name, "feature_distance": feature_distance(real, images)})


def report(names: list[str], seeds: int, out: Path, said: str) -> None:
    """Table and figures of the pairs of which both sides are made."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        pair = PAIRS[name]
        found = [
            [read(run_folder(out, run_name(pair.config, overrides, seed))) for seed in range(seeds)]
            for overrides in sides(pair)
        ]
        made = [[run for run in side if run is not None] for side in found]
        if not all(made):
            print(f"{name}: not both sides are made")
            continue
        rows[name] = {
            side: {
                "feature_distance": mean(run["feature_distance"] for run in runs),
                "of_seeds": [run["feature_distance"] for run in runs],
                "best": mean(
                    min((value for _, value in run["course"]), default=run["feature_distance"])
                    for run in runs
                ),
                "steps": mean(run["steps"] for run in runs),
                "seconds": [run["seconds"] for run in runs],
                "courses": [run["course"] for run in runs],
            }
            for side, runs in zip(("with", "without"), made, strict=True)
        }
        pairs = zip(rows[name]["with"]["of_seeds"], rows[name]["without"]["of_seeds"], strict=True)
        rows[name]["holds"] = [having < without for having, without in pairs]
    text = table(
        {
            "mechanism": lambda name, _: name,
            "distance with": lambda _, row: _distance(row["with"]),
            "without": lambda _, row: _distance(row["without"]),
            "best on the way with": lambda _, row: f"{row['with']['best']:.2f}",
            "without it": lambda _, row: f"{row['without']['best']:.2f}",
            "steps with / without": lambda _, row: (
                f"{row['with']['steps']:.0f} / {row['without']['steps']:.0f}"
            ),
            "as published": lambda _, row: f"{sum(row['holds'])} of {len(row['holds'])} seeds",
        },
        rows,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "gan_ablations.md").write_text(f"{said}, {seeds} seed(s)\n\n{text}", encoding="utf-8")
    changes = {name: [list(side) for side in sides(PAIRS[name])] for name in names}
    values = {"facts": said, "seeds": seeds, "pairs": rows, "changes": changes}
    (out / "gan_ablations.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(text)


def _distance(side: dict[str, Any]) -> str:
    each = side["of_seeds"]
    spread = f" ({', '.join(f'{value:.2f}' for value in each)})" if len(each) > 1 else ""
    return f"{side['feature_distance']:.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--at-once", type=int, default=1, choices=(1, 2), help="runs side by side")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each side")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="names, or beginnings of them")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-gan-ablations"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    torch.set_num_threads(1)
    if arguments.run:
        train_one(arguments.run, out, arguments.minutes)
        return
    names = [
        name for name in PAIRS if any(name.lower().startswith(asked.lower()) for asked in arguments.pairs)
    ]
    if not names:
        parser.error(f"no pairs {arguments.pairs}: choose among {', '.join(PAIRS)}")
    # All of one seed first, so that a table can be had early.
    runs = [
        run_name(PAIRS[name].config, overrides, seed)
        for seed in range(arguments.seeds)
        for name in names
        for overrides in sides(PAIRS[name])
    ]
    make_runs(
        Path(__file__).resolve(),
        list(dict.fromkeys(runs)),
        out,
        minutes=arguments.minutes,
        at_once=arguments.at_once,
        say=print,
    )
    report(names, arguments.seeds, out, facts(arguments.minutes, arguments.at_once))


if __name__ == "__main__":
    main()
