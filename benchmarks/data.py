"""Reading pictures: our folders and shards beside plain webdataset with Pillow, and what training needs.

    OMP_NUM_THREADS=1 python benchmarks/data.py [--photos DIR] [--repeats N] [--no-step]

Two sets of JPEGs: their shorter side is 256 px (about 30 kB each, cropped to 256), or 512 px (brought to 256,
then cropped). "webdataset" is WebDataset(tars) with a decoder by hand: Image.open, convert, resize of the
shorter side (bicubic), central crop, uint8 batches of torch. Ours crops at random places and mirrors. All
read files that the system holds in memory.

A rate is that of one core: CPU time is taken, of this process and its workers, so that other work on the
machine does not count. Repeats are interleaved; the medians' ratios are to be read. The consumer touches each
page of a batch. The training step is stage one of configs/demo at 256 px: the smallest, and so the one that
needs most pictures.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from taming.data.config import FolderDataConfig, ShardsDataConfig
from taming.data.dataset import open_dataset
from taming.data.loader import train_batches
from taming.data.scenes import render_scene
from taming.data.shards.pack import pack_folder

PHOTOS = Path(__file__).resolve().parents[2] / "shared/data/photos"
SIZE, BATCH, SHARDS, COUNT = 256, 16, 4, 192
AHEAD = 4
"""Batches that a worker holds ready, at most."""
KILOBYTES = {256: 30, 512: 85}
Pictures = Iterator[Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16, help="in a repeat")
    parser.add_argument("--only", choices=["folder", "shards", "webdataset"], action="append")
    parser.add_argument("--no-step", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for side in KILOBYTES:
            root = Path(scratch) / str(side)
            size = write_pictures(arguments.photos, root, side)
            print(
                f"{COUNT} pictures of {side} px, {size / 1000:.0f} kB each; batches of {BATCH} at {SIZE} px"
            )
            builders = contenders(root)
            names = [name for name in builders if name in (arguments.only or builders)]
            for workers in (0, 2):
                chosen = {name: builders[name] for name in names}
                found = measure(chosen, workers, arguments.repeats, arguments.batches)
                for name, rate in found.items():
                    compared = rate / found.get("webdataset", float("nan"))
                    print(
                        f"  {workers} workers  {name:<11} {rate:7.1f} pictures/s of a core"
                        f"  {compared:5.2f} x webdataset"
                    )
                    rates[f"{name} {side} px, {workers} workers"] = rate
    if not arguments.no_step:
        needed = step_rate(arguments.repeats)
        print(f"the small training step takes {needed:.2f} pictures/s of a core")
        for name, rate in rates.items():
            print(f"  {name:<30} {rate / needed:7.1f} x what it needs")


def write_pictures(photos: Path, root: Path, side: int) -> float:
    """COUNT JPEGs whose shorter side is `side`, as a folder, tars and our shards; returns bytes a picture."""
    folder = root / "images"
    folder.mkdir(parents=True)
    sources = sorted(photos.glob("*.jpg")) if photos.is_dir() else []
    for n in range(COUNT):
        if sources:
            image = Image.open(sources[n % len(sources)]).convert("RGB")
        else:
            image = Image.fromarray(render_scene(0, n, (side, side * 4 // 3)).image)
        scale = side / min(image.size)
        image = image.resize(
            (round(scale * image.width), round(scale * image.height)), Image.Resampling.LANCZOS
        )
        (folder / f"{n:04}.jpg").write_bytes(_as_jpeg(image, KILOBYTES[side] * 1000))
    files = sorted(folder.iterdir())
    (root / "tars").mkdir()
    for shard in range(SHARDS):
        with tarfile.open(root / f"tars/{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in files[shard::SHARDS]:
                tar.add(file, arcname=file.name)
    pack_folder(folder_config(root), root / "shards")
    return sum(file.stat().st_size for file in files) / len(files)


def _as_jpeg(image: Image.Image, size: int) -> bytes:
    """Of about `size` bytes: the quality is searched for."""
    low, high = 30, 97
    while True:
        quality = (low + high) // 2
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        if low >= high:
            return buffer.getvalue()
        low, high = (quality + 1, high) if buffer.tell() < size else (low, quality - 1)


def folder_config(root: Path) -> FolderDataConfig:
    return FolderDataConfig(root=root / "images", size=SIZE, validation_fraction=0)


def contenders(root: Path) -> dict[str, Callable[[int], Pictures]]:
    shards = ShardsDataConfig(root=str(root / "shards"), size=SIZE, validation_fraction=0)
    return {
        "webdataset": lambda workers: plain_webdataset(root / "tars", workers),
        "folder": lambda workers: ours(folder_config(root), workers),
        "shards": lambda workers: ours(shards, workers),
    }


def ours(config: Any, workers: int) -> Pictures:
    batches = train_batches(open_dataset(config, "train"), batch_size=BATCH, seed=0, workers=workers)
    for micro_batches in batches:
        yield micro_batches[0]["image"]


def plain_webdataset(folder: Path, workers: int) -> Pictures:
    import webdataset

    tars = sorted(map(str, folder.glob("*.tar")))
    data = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None, empty_check=False)
    batches = data.repeat().map(_decode).batched(BATCH, collation_fn=torch.stack)
    if workers == 0:
        return iter(batches)
    return iter(
        torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=AHEAD)
    )


def _decode(sample: dict[str, Any]) -> torch.Tensor:
    image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
    scale = SIZE / min(image.size)
    width, height = round(scale * image.width), round(scale * image.height)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    pixels = np.array(image.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def measure(
    builders: dict[str, Callable[[int], Pictures]], workers: int, repeats: int, batches: int
) -> dict[str, float]:
    """Pictures a second of CPU time by name, medians of interleaved repeats."""
    rates: dict[str, list[float]] = {name: [] for name in builders}
    for _ in range(repeats):
        for name, build in builders.items():
            # Its workers read ahead: none may while another is measured, and what they have is taken first.
            reader = build(workers)
            for _ in islice(reader, AHEAD * workers + 2):
                pass
            start, seen = cpu_seconds(), 0
            for batch in islice(reader, batches):
                seen += len(batch) if batch.flatten()[::4096].sum() else 0
            rates[name].append(seen / (cpu_seconds() - start))
            del reader
            gc.collect()
    return {name: statistics.median(values) for name, values in rates.items()}


def cpu_seconds() -> float:
    """CPU time that this process and those that it started have taken."""
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def step_rate(repeats: int) -> float:
    """Pictures a second of CPU time of the small training step."""
    from accelerate import Accelerator

    from stage1_vq.config import VQTrainConfig
    from stage1_vq.task import VQTask
    from taming.config import load_config

    path = Path(__file__).resolve().parents[1] / "configs/demo/stage1.yaml"
    overrides = [f"data.size={SIZE}", f"model.resolution={SIZE}", "model.quantizer.kmeans_init=false"]
    config = load_config(VQTrainConfig, path, overrides)
    batch = config.training.batch_size
    torch.manual_seed(0)
    task = VQTask(config)
    task.prepare(Accelerator(cpu=True), config.training.steps)
    images = torch.rand(batch, 3, SIZE, SIZE) * 2 - 1
    rates = []
    for step in range(900, 900 + min(repeats, 3) + 1):  # both players are at work
        start = time.process_time()
        task.train_step([{"image": images}], step=step)
        rates.append(batch / (time.process_time() - start))
    return statistics.median(rates[1:])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
