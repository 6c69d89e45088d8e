"""On a GPU: sampling against the memory's bandwidth, what guidance and batches cost, and training's MFU.

    python benchmarks/gpu_sampling.py [--size small large] [--repeats 5]

256 codes of 1024 with top-k 100 in bf16, by the captured graph and without. The floor is one read of the
weights, and of the keys and values so far, at the rate at which this device copies a gigabyte (bytes read
plus bytes written). MFU is the share of the device's own rate for a large bf16 matrix product that training
steps reach, counted as 6 operations a weight and token and 12 x layers x width x length for attention, with
autocast, fused AdamW and blocks compiled and not. `--device cpu` only shows that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import SIZES, VOCABULARY, our_gpt, print_table
from stage2_ar.sampling.inference import for_inference
from stage2_ar.sampling.sample import SamplingSettings, StepKind, picture_uniforms, sample_codes
from stage2_ar.transformer import Transformer, next_code_loss, weight_decay_groups
from taming.errors import UserError
from taming.types import Prefix

CELLS = 256
SETTINGS = SamplingSettings(top_k=100)
GUIDED = replace(SETTINGS, guidance_scale=2.0)


def seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of `work`, with all that it left to the device, after one run to warm up."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device, 9)


def product_rate(device: torch.device) -> float:
    """Operations a second of a large bf16 matrix product, on random numbers."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / seconds(lambda: left @ right, device, 9)


def sampling_seconds(
    model: Transformer, batch: int, settings: SamplingSettings, step: StepKind, repeats: int
) -> float:
    table = model.token_embedding.weight
    start = table[0].detach().expand(batch, 1, -1)
    prefix = Prefix(start, torch.ones(batch, 1, dtype=torch.bool, device=table.device))
    null = replace(prefix, embeddings=-start)
    uniforms = picture_uniforms(0, 0, batch, CELLS)

    def work() -> Tensor:
        return sample_codes(model, prefix, null, (16, 16), uniforms, settings, step=step)

    return seconds(work, table.device, repeats)


def bench_sampling(size: str, device: torch.device, repeats: int) -> list[list[str]]:
    model = for_inference(our_gpt(size, prefix_length=1).to(device).eval(), torch.bfloat16, 1)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    cache = model.config.num_layers * 2 * model.config.width * CELLS / 2
    floor = copy_bandwidth(device) / ((weights + cache) * 2)
    graph: StepKind = "auto" if device.type == "cuda" else "static"
    one = sampling_seconds(model, 1, SETTINGS, graph, repeats)
    eager = sampling_seconds(model, 1, SETTINGS, "eager", repeats)
    guided = sampling_seconds(model, 1, GUIDED, graph, repeats)
    eight = sampling_seconds(model, 8, SETTINGS, graph, repeats)
    share, cost = CELLS / one / floor, guided / one
    return [
        [f"{size}: floor, codes/s", f"{floor:.0f}", "", ""],
        [f"{size}: eager, codes/s", f"{CELLS / eager:.0f}", "", ""],
        [f"{size}: graph, codes/s", f"{CELLS / one:.0f}", "", ""],
        [f"{size}: graph of the floor", f"{share:.2f}", ">= 0.6", "met" if share >= 0.6 else "not met"],
        [f"{size}: guidance costs", f"{cost:.2f}", "<= 1.15", "met" if cost <= 1.15 else "not met"],
        [f"{size}: batch 8 to batch 1", f"{8 * one / eight:.2f}", "", ""],
    ]


def bench_training(size: str, device: torch.device, repeats: int, *, compiled: bool) -> list[str]:
    batch = {"small": 64, "large": 32}[size] if device.type == "cuda" else 2
    model = our_gpt(size, prefix_length=1).to(device)
    if compiled:
        model.compile_blocks()
    optimizer = torch.optim.AdamW(weight_decay_groups(model, 0.01), lr=1e-4, fused=True)
    codes = torch.randint(VOCABULARY, (batch, CELLS), device=device)
    mask = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def work() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(codes, Prefix(model.token_embedding.weight[:1].expand(batch, 1, -1), mask))
        next_code_loss(logits, codes).backward()
        optimizer.step()

    taken = seconds(work, device, repeats)
    layers, width, _ = SIZES[size]
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    operations = batch * CELLS * (6 * weights + 12 * layers * width * CELLS)
    share = operations / taken / product_rate(device)
    name = f"{size}: training MFU{', compiled' if compiled else ''}, {batch * CELLS / taken:.0f} tokens/s"
    return [name, f"{share:.2f}", ">= 0.4", "met" if share >= 0.4 else "not met"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled training out")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here; benchmarks/sampling.py is for CPUs")
    lines = []
    for size in arguments.size:
        lines += bench_sampling(size, device, arguments.repeats)
        for compiled in [False] if arguments.no_compile else [False, True]:
            lines.append(bench_training(size, device, arguments.repeats, compiled=compiled))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print_table(f"{name}, torch {torch.__version__}", ["", "measured", "bar", ""], lines)


if __name__ == "__main__":
    main()
