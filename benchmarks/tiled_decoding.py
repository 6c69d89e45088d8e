"""What decoding in tiles costs in memory and time, and how far it is from decoding at once.

    python benchmarks/tiled_decoding.py MODEL [--sizes 512 1024 2048] [--tile 256]

Each measurement has a process of its own, whose peak of resident memory beyond that of the loaded model is
told, so that nothing the process holds is missed; files are told apart. Codes are those of drawn scenes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from stage1_vq import VQModel
from stage1_vq.scratch import Scratch
from stage1_vq.tiling import decode_tiled
from taming.data.batch import to_device
from taming.data.source import data_from, open_split


def scene_codes(model: VQModel, size: int) -> torch.Tensor:
    """Codes (1, h, w) of a mosaic of four scenes of 256 pixels, repeated."""
    scenes = open_split(data_from("scenes", size=(256, 256), overrides=[]), "validation")
    images = to_device(scenes.batch(list(range(4)), [-1] * 4), "cpu")["image"]
    codes = model.encode(images)
    mosaic = torch.cat((torch.cat((codes[0], codes[1]), -1), torch.cat((codes[2], codes[3]), -1)))
    cells = size // model.config.downsample_factor
    repeats = -(-cells // mosaic.shape[0])
    return mosaic.repeat(repeats, repeats)[None, :cells, :cells]


def measure(model: VQModel, codes: torch.Tensor, tile: int, out: Path) -> dict[str, float]:
    """Seconds, MiB of memory and of files of one decoding, whose picture goes to `out`."""
    written = [0]
    made = Scratch.new_map

    def counted(self: Scratch, channels: int, height: int, width: int) -> object:
        found = made(self, channels, height, width)
        if found.file is not None:
            written[0] = max(written[0], channels * height * width * 4)
        return found

    Scratch.new_map = counted  # type: ignore[method-assign,assignment]
    with torch.no_grad():
        model.decode(codes[:, :8, :8])  # what is set up once
        before = restart_peak()
        start = time.perf_counter()
        painted = decode_tiled(model, codes, tile=tile) if tile else model.decode(codes)
        seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    torch.save(painted, out)
    return {"seconds": seconds, "memory_mib": (peak - before) / 1024, "largest_file_mib": written[0] / 2**20}


def restart_peak() -> int:
    """Resident KiB now, from which on the peak is counted (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(name: str) -> int:
    """KiB that the kernel tells of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--whole-up-to", type=int, default=1024, help="larger pictures only in tiles")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--one", nargs=3, metavar=("CODES", "TILE", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    model = VQModel.from_pretrained(asked.model)
    if asked.one:
        codes, tile, out = asked.one
        figures = measure(model, torch.load(codes, weights_only=True), int(tile), Path(out))
        sys.stdout.write(json.dumps(figures) + "\n")
        return
    line = "{:>6} {:>7} {:>9} {:>12} {:>12} {:>12} {:>14} {:>14}"
    heads = (
        "size",
        "way",
        "seconds",
        "memory, MiB",
        "output, MiB",
        "file, MiB",
        "mean diff/255",
        "max diff/255",
    )
    sys.stdout.write(line.format(*heads) + "\n")
    for size in asked.sizes:
        with tempfile.TemporaryDirectory() as folder:
            codes = Path(folder) / "codes.pt"
            torch.save(scene_codes(model, size), codes)
            pictures = {}
            for tile in (0, asked.tile) if size <= asked.whole_up_to else (asked.tile,):
                out = Path(folder) / f"{tile}.pt"
                ran = subprocess.run(
                    [sys.executable, __file__, asked.model, "--one", str(codes), str(tile), str(out)],
                    capture_output=True, text=True, check=True,
                )  # fmt: skip
                figures = json.loads(ran.stdout.splitlines()[-1])
                pictures[tile] = torch.load(out, weights_only=True)
                differences = ("", "")
                if tile and 0 in pictures:
                    error = (pictures[tile].clamp(-1, 1) - pictures[0].clamp(-1, 1)).abs() * 127.5
                    differences = (f"{float(error.mean()):.1e}", f"{float(error.max()):.1e}")
                sys.stdout.write(
                    line.format(
                        size, f"tile {tile}" if tile else "whole", f"{figures['seconds']:.1f}",
                        f"{figures['memory_mib']:.0f}", f"{size * size * 12 / 2**20:.0f}",
                        f"{figures['largest_file_mib']:.0f}", *differences,
                    ) + "\n"
                )  # fmt: skip
                sys.stdout.flush()


if __name__ == "__main__":
    main()
