"""Stage two: train a transformer on codes, and sample pictures from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stage2_ar.sample_cli import sample
from taming.options import (
    BatchSize,
    ConfigName,
    Data,
    DataOverride,
    Device,
    DryRun,
    Override,
    Resume,
    Split,
    progress_bar,
    show_figures,
)

app = typer.Typer(help=__doc__, no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A saved pipeline: a folder, a run, or a hub id.")]


@app.command()
def train(
    config: ConfigName, override: Override = None, resume: Resume = "auto", dry_run: DryRun = False
) -> None:
    """Train a transformer on the codes of pictures. `taming ar configs` lists the shipped configs."""
    from stage2_ar.config import ARTrainConfig
    from taming.config import load_config
    from taming.training.launch import train_or_describe

    values = load_config(ARTrainConfig, config, override or [], group="stage2")
    from stage2_ar.describe import describe
    from stage2_ar.train import train

    train_or_describe(train, describe, values, values.training, config, resume=resume, dry_run=dry_run)


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from rich.console import Console

    from taming.training.launch import print_configs

    print_configs("stage2", Console())


app.command()(sample)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json.")] = None,
    split: Split = "all",
    override: DataOverride = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Measure how probable pictures are to the transformer: nats and bits a code, bits a pixel."""
    from stage2_ar import ARPipeline
    from stage2_ar.evaluate import evaluate_pipeline
    from taming.data.source import data_from, open_split
    from taming.training.distributed import pick_device

    pipe = ARPipeline.from_pretrained(model).to(pick_device(device))
    config = pipe.model.config
    trained = config.grid[0] * config.downsample_factor, config.grid[1] * config.downsample_factor
    dataset = open_split(data_from(data, size=trained, overrides=override or []), split)
    with progress_bar("eval") as report:
        figures = evaluate_pipeline(pipe, dataset, batch_size=batch_size, progress=report)
    facts = {**figures, "split": split, "size": list(dataset.size), "tokenizer_hash": config.tokenizer_hash}
    show_figures(f"{model} on {data}", facts, out)
