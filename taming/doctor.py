"""Versions, devices, disk, data and weights: what would fail, said first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(add_completion=False)

PACKAGES = (
    "torch",
    "torchvision",
    "accelerate",
    "transformers",
    "lpips",
    "safetensors",
    "pillow",
    "webdataset",
)
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
LOW_DISK_GIB = 5


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "note", "fails"]
    says: str


@app.command(help=__doc__)
def doctor(
    data: Annotated[
        str | None, typer.Option(help="Also open this folder of pictures, as training would.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="The crop that --data is checked for.")] = 64,
    out: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("runs"),
) -> None:
    """Exit code 0 where nothing would fail, else 1."""
    from rich.console import Console
    from rich.table import Table

    findings = [
        *_software(),
        *_devices(),
        _launcher(),
        *_disk(out),
        *_weights(),
        *(_data(data, size) if data else ()),
    ]
    colours = {"ok": "green", "note": "yellow", "fails": "red"}
    table = Table("", "what", "finding", box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(state, finding.what, finding.says)
    Console().print(table)
    raise typer.Exit(int(any(finding.state == "fails" for finding in findings)))


def _software() -> Iterator[Finding]:
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "fails", f"not installed; pip install {name}")
    try:
        import torchvision.ops  # noqa: F401 (a mismatch with torch shows on import)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        yield Finding(
            "torch and torchvision",
            "fails",
            f"they do not fit together ({reason}); "
            "install both from one index: pip install -U torch torchvision",
        )


def _devices() -> Iterator[Finding]:
    import torch

    from taming.training.distributed import native_bf16

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory = properties.total_memory / 2**30
            yield Finding(f"cuda:{number}", "ok", f"{properties.name}, {memory:.0f} GiB")
    else:
        yield Finding("GPU", "note", "none that torch can use: training runs on the CPU")
    yield Finding("CPU", "ok", f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")
    if native_bf16():
        yield Finding("precision", "ok", "auto means bf16 here")
    else:
        yield Finding("precision", "note", "auto means fp32 here: no native bf16")
    if not torch.cuda.is_available() and os.name == "posix":
        unset = [f"{name}={value}" for name, value in ALLOCATOR.items() if os.environ.get(name) != value]
        if unset:
            yield Finding(
                "allocator",
                "note",
                f"large pictures train about 1.2 times as fast on a CPU with: export {' '.join(unset)}",
            )
        else:
            yield Finding("allocator", "ok", "keeps its memory between steps")


def _launcher() -> Finding:
    """What `accelerate launch` would do here without options."""
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    path, what = Path(default_config_file), "accelerate launch"
    if not path.is_file():
        return Finding(what, "ok", "no config of its own: a process for each GPU, or one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind, processes = values["distributed_type"], int(values.get("num_processes", 1))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        return Finding(what, "note", f"{path} cannot be read ({error!r}); write it anew: accelerate config")
    says = f"{path}: {kind}, {processes} process(es)"
    sharding = values.get("fsdp_config") or {}
    if kind == "FSDP" and sharding.get("fsdp_version") != 2:
        return Finding(what, "note", f"{says}; training refuses it: set fsdp_version to 2")
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        return Finding(what, "note", f"{says}; training knows MULTI_GPU and FSDP only")
    if values.get("use_cpu") and processes > 1:
        return Finding(what, "note", f"{says}, of which it starts one: use taming launch --cpu {processes}")
    return Finding(what, "ok", says)


def _disk(out: Path) -> Iterator[Finding]:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield Finding("disk", "fails", f"{place} cannot be written; set training.output to another folder")
        return
    free = shutil.disk_usage(place).free / 2**30
    state: Literal["ok", "note"] = "note" if free < LOW_DISK_GIB else "ok"
    yield Finding("disk", state, f"{free:.1f} GiB free at {place}")


def _weights() -> Iterator[Finding]:
    from taming.metrics.lpips import cached_vgg_weights

    path = cached_vgg_weights()
    if path is not None:
        yield Finding("VGG16 weights", "ok", str(path))
    else:
        yield Finding(
            "VGG16 weights",
            "note",
            "not here: the perceptual loss downloads them (528 MiB) or takes loss.vgg_weights=PATH; "
            "loss.perceptual_weight=0 needs none",
        )


def _data(data: str, size: int) -> Iterator[Finding]:
    from taming.data.source import data_from, open_split
    from taming.errors import UserError

    try:
        config = data_from(data, size=size)
        counts = {split: len(open_split(config, split)) for split in ("train", "validation")}
    except UserError as error:
        yield Finding("data", "fails", str(error))
        return
    yield Finding("data", "ok", f"{counts['train']} training and {counts['validation']} validation pictures")
