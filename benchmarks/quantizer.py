"""Nearest-code search and the whole quantizer, beside the matmul that any exact search must do.

    python benchmarks/quantizer.py [--repeats N]

z is [2048, 256], as pictures with the channels first or last. "matmul floor" is z @ codes.T into a ready
buffer; "search" is ours, indices only; "forward" is the quantizer in training mode with its loss;
vector-quantize-pytorch moves its codebook by EMA in the forward. Medians of interleaved repeats, ratios to
the floor of that run. Memory is the peak of what torch's allocator holds beyond the start. At 262144 codes
the contenders that hold all distances are left out: they would need 2 GiB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.peak_memory import peak_bytes
from stage1_vq.quantizers import NearestConfig, NearestQuantizer
from stage1_vq.quantizers.search import nearest_codes

LATENTS, DIM = 2048, 256


def contenders(codebook_size: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    z = torch.randn(LATENTS, DIM)
    first = z.view(8, 16, 16, DIM).permute(0, 3, 1, 2).contiguous().requires_grad_()
    last = first.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    codes = torch.randn(codebook_size, DIM)
    ours = NearestQuantizer(NearestConfig(codebook_size=codebook_size, code_dim=DIM)).train()

    def our_backward() -> None:
        output = ours(last)
        (output.quantized.sum() + output.loss).backward()

    works: dict[str, Callable[[], object]] = {
        "ours, search": lambda: nearest_codes(z, codes),
        "ours, forward, channels first": lambda: ours(first.detach()),
        "ours, forward, channels last": lambda: ours(last.detach()),
        "ours, forward and backward": our_backward,
    }
    if codebook_size > 2**16:
        return works

    product = torch.empty(LATENTS, codebook_size)
    theirs = VectorQuantize(dim=DIM, codebook_size=codebook_size, accept_image_fmap=True).train()

    def their_backward() -> None:
        quantized, _, loss = theirs(first)
        (quantized.sum() + loss.sum()).backward()

    def cdist() -> Tensor:
        return torch.cdist(z, codes).argmin(1)

    return {
        "matmul floor": lambda: torch.mm(z, codes.t(), out=product),
        "cdist + argmin": cdist,
        **works,
        "vector-quantize-pytorch, forward": lambda: theirs(first.detach()),
        "vector-quantize-pytorch, both": their_backward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, z [{LATENTS}, {DIM}]")
    for codebook_size in (1024, 16384, 262144):
        works = contenders(codebook_size)
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range((arguments.repeats if "matmul floor" in works else 1) + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if repeat:  # the first one warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
        floor = statistics.median(times["matmul floor"]) if "matmul floor" in times else None
        print(f"{codebook_size} codes {'':<24} {'ms':>7} {'x floor':>8} {'MiB':>6}")
        for name, work in works.items():
            median = statistics.median(times[name])
            ratio = f"{median / floor:8.2f}" if floor else f"{'':>8}"
            print(f"  {name:<34} {median:7.1f} {ratio} {peak_bytes(work) / 2**20:6.0f}")


if __name__ == "__main__":
    main()
