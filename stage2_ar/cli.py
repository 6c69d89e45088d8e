"""Stage two: train a transformer on codes, and sample pictures from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stage2_ar.interop.cli import import_pipeline
from stage2_ar.sample_command.cli import sample
from taming.errors import UserError
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
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json, and memorisation.png.")] = None,
    split: Split = "all",
    memorisation: Annotated[
        bool,
        typer.Option(
            "--memorisation",
            help="Compare training with held-out pictures, and samples with the nearest training pictures.",
        ),
    ] = False,
    num: Annotated[int, typer.Option(min=1, help="Samples that --memorisation looks at.")] = 32,
    limit: Annotated[int, typer.Option(min=1, help="Training pictures that it searches at most.")] = 4096,
    override: DataOverride = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Measure how probable pictures are to the transformer: nats and bits a code, bits a pixel.

    DATA may be a folder of codes. With --memorisation: has it learned its training pictures by heart?
    """
    from stage2_ar import ARPipeline
    from stage2_ar.evaluate import evaluate_pipeline, open_data
    from stage2_ar.memorisation import measure_memorisation
    from taming.data.picture import save_png
    from taming.training.distributed import pick_device

    if memorisation and split != "all":
        raise UserError(f"--memorisation compares both splits; leave --split {split} out")
    pipe = ARPipeline.from_pretrained(model).to(pick_device(device))
    facts: dict[str, Any] = {"split": split, "tokenizer_hash": pipe.model.config.tokenizer_hash}
    if memorisation:
        train_data, held_out = (
            open_data(pipe, data, part, overrides=override or []) for part in ("train", "validation")
        )
        with progress_bar("eval") as report:
            result = measure_memorisation(
                pipe, train_data, held_out, samples=num, limit=limit, batch_size=batch_size, progress=report
            )
        facts = {**result.figures, **facts, "size": list(held_out.size)}
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_png(result.sheet, out / "memorisation.png")
    else:
        dataset = open_data(pipe, data, split, overrides=override or [])
        with progress_bar("eval") as report:
            figures = evaluate_pipeline(pipe, dataset, batch_size=batch_size, progress=report)
        facts = {**figures, **facts, "size": list(dataset.size)}
    show_figures(f"{model} on {data}", facts, out)
    if memorisation:
        typer.echo(result.verdict)


# Registered here, so that help lists it last.
app.command("import")(import_pipeline)
