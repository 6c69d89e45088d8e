"""What a checkpoint costs: seconds a GB, the share of hashing and of waiting for the disk, peak memory.

    python benchmarks/checkpoint.py [--parameters 100e6] [--rounds 3] [--folder DIR]

Contenders, each in a process of its own so that its peak of memory is its own, in turns:

    save_checkpoint     tensor by tensor, hashed on the way
    without hash        the same with a hash that does nothing: the difference is what hashing costs
    without sync        the same with an fsync that does nothing: the difference is what the disk costs
    clones, then reads  every tensor cloned, safetensors' own writer, the files read again for their sha256
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from taming import tensor_file
from taming.training.checkpoint import _split_optimizers, save_checkpoint


class _NoHash:
    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def trained(parameters: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of so many weights in layers of 4 M each, after one step of Adam."""
    width = 2048
    layers = [nn.Linear(width, width, bias=False) for _ in range(max(parameters // width**2, 1))]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def clones_then_reads(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    folder.mkdir(parents=True)
    _, state = _split_optimizers({"adam": optimizer})
    for name, tensors in (("modules", model.state_dict()), ("optimizers", state)):
        path = folder / f"{name}.safetensors"
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, path)
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        with path.open("rb") as file:
            hashlib.file_digest(file, "sha256")


def memory(name: str) -> int:
    """Bytes of this process, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(contender: str, parameters: int, folder: Path, answer: object) -> None:
    model, optimizer = trained(parameters)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before = memory("VmRSS")
    if contender == "without hash":
        tensor_file.hashlib.sha256 = lambda *_: _NoHash()  # type: ignore[attr-defined]
    if contender == "without sync":
        os.fsync = lambda handle: None
    accelerator = Accelerator(cpu=True)
    begin = time.perf_counter()
    if contender == "clones, then reads":
        clones_then_reads(folder / "step", model, optimizer)
    else:
        save_checkpoint(accelerator, folder, 1, {"model": model}, {"adam": optimizer}, {})
    seconds = time.perf_counter() - begin
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    more = memory("VmHWM") - before
    answer.send((seconds, written, more))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=100e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to be measured")
    options = parser.parse_args()
    names = ("save_checkpoint", "without hash", "without sync", "clones, then reads")
    results: dict[str, list[tuple[float, int, int]]] = {name: [] for name in names}
    context = get_context("fork")
    for _ in range(options.rounds):
        for name in names:
            folder = Path(tempfile.mkdtemp(dir=options.folder))
            ours, theirs = context.Pipe()
            process = context.Process(target=measure, args=(name, int(options.parameters), folder, theirs))
            process.start()
            results[name].append(ours.recv())
            process.join()
            shutil.rmtree(folder)
    print(f"{results[names[0]][0][1] / 1e9:.2f} GB a checkpoint, medians of {options.rounds}")
    for name, rows in results.items():
        pace = statistics.median(seconds / (size / 1e9) for seconds, size, _ in rows)
        spread = [seconds / (size / 1e9) for seconds, size, _ in rows]
        more = statistics.median(more / size for _, size, more in rows)
        print(
            f"{name:20} {pace:6.2f} s/GB ({min(spread):.2f} to {max(spread):.2f}), "
            f"{more:.2f} times the checkpoint more memory at its peak"
        )


if __name__ == "__main__":
    main()
