"""GANs: paint pictures from noise, without a codebook."""

from __future__ import annotations

import typer

from taming.gan.evaluate_cli import evaluate
from taming.gan.sample_cli import sample
from taming.options import ConfigName, DryRun, Override, Resume

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command()
def train(
    config: ConfigName, override: Override = None, resume: Resume = "auto", dry_run: DryRun = False
) -> None:
    """Train a generator against a discriminator. `taming gan configs` lists the shipped configs."""
    from taming.config import load_config
    from taming.gan.config import GANTrainConfig
    from taming.training.launch import train_or_describe

    values = load_config(GANTrainConfig, config, override or [], group="gan")
    from taming.gan.train import describe, train

    train_or_describe(train, describe, values, values.training, config, resume=resume, dry_run=dry_run)


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from rich.console import Console

    from taming.training.launch import print_configs

    print_configs("gan", Console())


app.command("sample")(sample)
app.command("eval")(evaluate)
