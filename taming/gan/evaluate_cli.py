"""`taming gan eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from taming.options import BatchSize, Data, DataOverride, Device, Split, progress_bar, show_figures

SHOWN = 12
"""Pictures of a row of the sheet."""


def evaluate(
    model: Annotated[str, typer.Argument(help="A saved generator: a folder, a run, or a hub id.")],
    data: Data,
    out: Annotated[Path | None, typer.Option(help="Folder for metrics.json and sheet.png.")] = None,
    num: Annotated[
        int | None, typer.Option(min=2, help="Pictures to paint; default: as many as the data has.")
    ] = None,
    split: Split = "all",
    fid: Annotated[
        bool, typer.Option("--fid", help="FID, Inception Score and KID too (Inception weights).")
    ] = False,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception; default: its cache or download.")
    ] = None,
    classes: Annotated[
        bool, typer.Option("--classes", help="Whether classes are told apart: trains a judge, a minute.")
    ] = False,
    truncation: Annotated[
        float | None, typer.Option(help="Noise within so much of 0, as in `sample`.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")] = 0,
    override: DataOverride = None,
    batch_size: BatchSize = 32,
    device: Device = None,
) -> None:
    """Measure how close painted pictures are to real ones; FID, IS, KID and class accuracy if asked for."""
    from taming.data.dataset import open_dataset
    from taming.data.picture import save_png
    from taming.data.source import data_from, open_split
    from taming.gan.evaluate import check_classes, check_pictures, evaluate_gan, evaluation_protocol
    from taming.gan.model import GANModel
    from taming.gan.sample import sample_noise
    from taming.metrics.fidelity import check_fidelity
    from taming.metrics.told_apart import train_classifier
    from taming.training.distributed import pick_device

    place = pick_device(device)
    gan = GANModel.from_pretrained(model)
    sample_noise(1, 1, seed=seed, truncation=truncation)  # refuses a wrong truncation at once
    config = data_from(data, size=gan.config.size, overrides=override or [])
    dataset = open_split(config, split)
    if len(dataset):
        check_pictures(gan, dataset)
    if classes:
        check_classes(gan, dataset)
    if fid:
        check_fidelity(inception_weights, gan.config.channels)
    judge = None
    if classes:
        with progress_bar("judge") as report:
            judge = train_classifier(open_dataset(config, "train"), device=place, progress=report)
    with progress_bar("eval") as report:
        figures = evaluate_gan(
            gan,
            dataset,
            num=num,
            seed=seed,
            truncation=truncation,
            batch_size=batch_size,
            device=place,
            fid=fid,
            inception_weights=inception_weights,
            judge=judge,
            unseen=open_dataset(config, "validation") if classes else None,
            progress=report,
        )
    counts = {"num": int(figures["pictures"]), "real": int(figures["real_pictures"])}
    facts: dict[str, Any] = {
        **figures,
        **evaluation_protocol(config, split, **counts, seed=seed, truncation=truncation, fid=fid),
        "model_hash": gan.content_hash(),
    }
    show_figures(f"{model} on {data}", facts, out)
    if out is not None and gan.config.channels in (1, 3, 4):
        save_png(_sheet(gan, dataset, seed, truncation), out / "sheet.png")
        typer.echo(f"real pictures over painted ones in {out / 'sheet.png'}")


def _sheet(gan: Any, dataset: Any, seed: int, truncation: float | None) -> Any:
    """Real pictures, and painted ones of each of the first classes, a row each."""
    from taming.data.batch import to_device
    from taming.gan.sheet import captioned_rows

    count = min(SHOWN, len(dataset))
    rows = [("real", to_device(dataset.batch(range(count), [-1] * count), "cpu")["image"])]
    if gan.config.num_classes is None:
        rows.append(("painted", gan.sample(2 * SHOWN, seed=seed, truncation=truncation)))
    for number in range(min(gan.config.num_classes or 0, SHOWN)):
        images = gan.sample(SHOWN, seed=seed, classes=number, truncation=truncation)
        rows.append((f"painted: {gan.class_name(number)}", images))
    return captioned_rows(rows, columns=SHOWN)
