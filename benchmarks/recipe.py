"""What each part of the small-data recipe gives: photos_64 whole, and with one part taken out, at equal time.

    python benchmarks/recipe.py PHOTOS [--held-out OTHER_PHOTOS] [--minutes 3] [--only NAME ...]

Every contender trains for the same minutes on this machine, so use it while nothing else runs. Held-out
figures are those of `taming vq eval`: shorter side to 64, centre crop.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from stage1_vq.config import VQTrainConfig
from stage1_vq.evaluate import evaluate_tokenizer
from stage1_vq.model import VQModel
from stage1_vq.train import train
from taming.config import load_config
from taming.data.source import data_from, open_split

WIDE_AT_FULL_SIZE = ["model.channels=32", "model.channel_multipliers=[1,2,2]", "model.norm_num_groups=32"]
PATCHES = [
    *("model.patch_size=2", "model.channels=64"),
    *("model.channel_multipliers=[1,1]", "model.norm_num_groups=32"),
]
PLAIN_CODES = "model.quantizer={kind: nearest, codebook_size: 512, code_dim: 8}"
NEAREST_CODES = (
    "model.quantizer={kind: nearest, codebook_size: 512, code_dim: 8, l2_normalised: true, "
    "kmeans_init: true, revive_after: 50}"
)
CONTENDERS: dict[str, list[str]] = {
    "the whole recipe": [],
    "no adversarial term": ["discriminator=null"],
    "Adam at 1e-3 for all weights": ["optimizer.method=adam", "optimizer.learning_rate=1e-3"],
    "32 channels at full size": WIDE_AT_FULL_SIZE,
    "no layers at full size (patch_size 2)": PATCHES,
    "codes by gradient, not averages": [NEAREST_CODES],
    "codes by gradient, from noise, not normalised": [PLAIN_CODES],
    "l1 for l2": ["loss.reconstruction=l1"],
    "constant learning rate": ["optimizer.schedule=constant"],
    "no average of the weights": ["training.ema_decay=null"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="further folders to measure on")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", choices=list(CONTENDERS), default=list(CONTENDERS))
    arguments = parser.parse_args()
    print("| recipe | steps | parameters | PSNR, dB | usage | perplexity |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                f"data.root={arguments.photos}",
                "data.validation_fraction=0.25",
                f"training.minutes={arguments.minutes}",
                "training.evaluate_every=1000000",
                "training.preview_every=1000000",
                *CONTENDERS[name],
            ]
            config = load_config(VQTrainConfig, "photos_64", overrides, group="stage1")
            result = train(config, Path(folder) / "run")
            model = VQModel.from_pretrained(result.model)
        sources = [open_split(config.data, "validation")]
        sources += [open_split(data_from(str(path), size=64), "all") for path in arguments.held_out]
        figures = [evaluate_tokenizer(model, source).figures for source in sources]
        columns = [
            " / ".join(f"{each[key]:{form}}" for each in figures)
            for key, form in (("psnr", ".2f"), ("code_usage", ".3f"), ("perplexity", ".0f"))
        ]
        parameters = sum(weight.numel() for weight in model.parameters())
        print(f"| {name} | {result.steps} | {parameters:,} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
