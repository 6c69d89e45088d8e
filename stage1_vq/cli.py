"""Stage one: train a codebook, and turn pictures into codes and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stage1_vq.compact_cli import compact
from stage1_vq.interop.cli import export_model, import_model
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
    Tile,
    empty_folder,
    parse_size,
    progress_bar,
    show_figures,
)

app = typer.Typer(help=__doc__, no_args_is_help=True)

Model = Annotated[str, typer.Argument(help="A saved tokenizer: a folder, a run, or a hub id.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 64, or HxW as in 64x96; default: as trained.")]


@app.command()
def train(
    config: ConfigName, override: Override = None, resume: Resume = "auto", dry_run: DryRun = False
) -> None:
    """Train a codebook on pictures. `taming vq configs` lists the shipped configs."""
    from stage1_vq.config import VQTrainConfig
    from taming.config import load_config
    from taming.training.launch import train_or_describe

    values = load_config(VQTrainConfig, config, override or [], group="stage1")
    from stage1_vq.train import describe, train

    train_or_describe(train, describe, values, values.training, config, resume=resume, dry_run=dry_run)


@app.command()
def configs() -> None:
    """List the shipped configs."""
    from rich.console import Console

    from taming.training.launch import print_configs

    print_configs("stage1", Console())


@app.command()
def reconstruct(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the PNG files.")],
    size: Annotated[
        str | None,
        typer.Option(help="Pixels: 64, or HxW; default: each picture's own, or the only size it paints."),
    ] = None,
    tile: Tile = None,
    override: DataOverride = None,
    device: Device = None,
) -> None:
    """Paint pictures back from their codes: one PNG each, and picture over reconstruction in a sheet."""
    import torch

    from stage1_vq.evaluate import reconstruct
    from stage1_vq.inputs import as_picture
    from stage1_vq.pictures import numbered_inputs, save_restored
    from taming.data.picture import save_png
    from taming.data.picture import tile as tile_pictures
    from taming.training.distributed import pick_device

    tokenizer, place = _load(model), pick_device(device)
    tokenizer.to(place)
    frame = None if size is None else parse_size(size)
    if frame is None:
        frame = tokenizer.decoder.only_size
    else:
        tokenizer.check_painted_size(*frame)
    inputs = numbered_inputs(data, frame, tokenizer.config, override or [])
    empty_folder(out)
    shown: list[torch.Tensor] = []
    done = 0
    with progress_bar("reconstruct") as report:
        for done, (total, key, values) in enumerate(inputs, 1):
            _, painted = reconstruct(tokenizer, values[None].to(place), tile=tile)
            pair = [as_picture(x, tokenizer.config)[0].cpu() for x in (values[None], painted)]
            save_restored(painted[0], tokenizer.config, out, key)
            if len(shown) < 16 and (not shown or shown[0].shape == pair[0].shape):
                shown += pair
            report(done, total)
    sheet = torch.stack(shown[0::2] + shown[1::2])
    save_png(tile_pictures(sheet, columns=len(shown) // 2), out / "sheet.png")
    typer.echo(f"{done} reconstructions in {out}; {out / 'sheet.png'} shows pictures over reconstructions")


@app.command()
def encode(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="A new or empty folder for the codes.")],
    size: Size = None,
    views: Annotated[
        int, typer.Option(min=1, help="Crops and flips of each picture; the first is centred.")
    ] = 1,
    keep: Annotated[
        str,
        typer.Option(
            help="Pictures to store beside the codes, for conditions made of them: image,condition_image."
        ),
    ] = "",
    override: DataOverride = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Write the codes of a data set, for stage two and for others to read."""
    from stage1_vq.codes import write_codes
    from taming.data.dataset import open_dataset
    from taming.training.distributed import pick_device

    tokenizer = _load(model)
    config = _data(data, size, tokenizer, override)
    datasets: Any = {split: open_dataset(config, split) for split in ("train", "validation")}
    datasets = {split: dataset for split, dataset in datasets.items() if len(dataset)}
    total = views * sum(map(len, datasets.values()))
    with progress_bar("encode") as report:
        index = write_codes(
            tokenizer,
            datasets,
            out,
            views=views,
            keep=[name.strip() for name in keep.split(",") if name.strip()],
            batch_size=batch_size,
            device=pick_device(device),
            progress=lambda done: report(done, total),
        )
    counts = ", ".join(f"{len(dataset)} {split}" for split, dataset in datasets.items())
    height, width = index.grid
    typer.echo(f"{counts} pictures x {views} view(s) as {height}x{width} codes in {out}")
    typer.echo(f"train on them with: taming ar train CONFIG -o data.kind=codes -o data.root={out}")


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, pictures.csv and sheet.png.")
    ] = None,
    split: Split = "all",
    size: Size = None,
    lpips: Annotated[bool, typer.Option("--lpips", help="Perceptual distance too (VGG16 weights).")] = False,
    fid: Annotated[bool, typer.Option("--fid", help="Reconstruction FID too (Inception weights).")] = False,
    vgg_weights: Annotated[
        Path | None, typer.Option(help="torchvision's VGG16; default: its cache or download.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="torch-fidelity's Inception; default: its cache or download.")
    ] = None,
    override: DataOverride = None,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Measure how well pictures survive: PSNR, SSIM, code usage, perplexity; LPIPS and FID if asked for."""
    from stage1_vq.evaluate import check_perceptual, evaluate_tokenizer, protocol, write_rows
    from stage1_vq.sheet import survival_sheet
    from taming.data.picture import save_png
    from taming.data.source import open_split
    from taming.metrics.inception import InceptionFeatures
    from taming.metrics.lpips import PerceptualDistance
    from taming.training.distributed import pick_device

    tokenizer, place = _load(model), pick_device(device)
    config = _data(data, size, tokenizer, override)
    dataset = open_split(config, split)
    check_perceptual(tokenizer, lpips=lpips, fid=fid)
    with progress_bar("eval") as report:
        result = evaluate_tokenizer(
            tokenizer,
            dataset,
            batch_size=batch_size,
            device=place,
            lpips=PerceptualDistance(vgg_weights) if lpips else None,
            inception=InceptionFeatures(inception_weights) if fid else None,
            progress=report,
        )
    facts: dict[str, Any] = {
        **result.figures,
        **protocol(config, tokenizer.config, split, lpips=lpips, fid=fid),
        "codebook_size": tokenizer.spec.codebook_size,
        "tokenizer_hash": tokenizer.content_hash(),
    }
    show_figures(f"{model} on {data}", facts, out)
    if out is not None:
        write_rows(result, out / "pictures.csv")
        save_png(survival_sheet(tokenizer, dataset, result, device=place), out / "sheet.png")
        typer.echo(f"each picture's figures in {out / 'pictures.csv'}, examples in {out / 'sheet.png'}")


# In the order of help: what is done to a tokenizer after what it does.
app.command("import")(import_model)
app.command("export")(export_model)
app.command("compact")(compact)


def _load(source: str) -> Any:
    from stage1_vq import VQModel

    return VQModel.from_pretrained(source)


def _data(data: str, size: str | None, tokenizer: Any, overrides: list[str] | None) -> Any:
    from stage1_vq.inputs import data_for

    frame = tokenizer.config.resolution if size is None else parse_size(size)
    return data_for(tokenizer.config, data, size=frame, overrides=overrides or [])
