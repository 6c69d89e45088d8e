"""Nearest-code search and the whole quantizer, beside the matmul that any exact search must do.

    python benchmarks/quantizer.py [--repeats N]

z is [2048, 256]. "matmul floor" is z @ codes.T into a ready buffer; "search" is ours, indices only; "forward"
is the quantizer in training mode with its loss; vector-quantize-pytorch moves its codebook by EMA in the
forward. Medians of interleaved repeats, ratios to the floor of that run. Memory is the peak of what torch's
allocator holds beyond the start.
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
    pictures = z.view(8, 16, 16, DIM).permute(0, 3, 1, 2).contiguous().requires_grad_()
    codes = torch.randn(codebook_size, DIM)
    product = torch.empty(LATENTS, codebook_size)
    ours = NearestQuantizer(NearestConfig(codebook_size=codebook_size, code_dim=DIM)).train()
    theirs = VectorQuantize(dim=DIM, codebook_size=codebook_size, accept_image_fmap=True).train()

    def our_backward() -> None:
        output = ours(pictures)
        (output.quantized.sum() + output.loss).backward()

    def their_backward() -> None:
        quantized, _, loss = theirs(pictures)
        (quantized.sum() + loss.sum()).backward()

    def cdist() -> Tensor:
        return torch.cdist(z, codes).argmin(1)

    return {
        "matmul floor": lambda: torch.mm(z, codes.t(), out=product),
        "cdist + argmin": cdist,
        "ours, search": lambda: nearest_codes(z, codes),
        "ours, forward": lambda: ours(pictures.detach()),
        "vector-quantize-pytorch, forward": lambda: theirs(pictures.detach()),
        "ours, forward and backward": our_backward,
        "vector-quantize-pytorch, both": their_backward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, z [{LATENTS}, {DIM}]")
    for codebook_size in (1024, 16384):
        works = contenders(codebook_size)
        times: dict[str, list[float]] = {name: [] for name in works}
        for repeat in range(arguments.repeats + 1):
            for name, work in works.items():
                start = time.perf_counter()
                work()
                if repeat:  # the first one warms up
                    times[name].append(1e3 * (time.perf_counter() - start))
        floor = statistics.median(times["matmul floor"])
        print(f"{codebook_size} codes {'':<24} {'ms':>7} {'x floor':>8} {'MiB':>6}")
        for name, work in works.items():
            median = statistics.median(times[name])
            print(f"  {name:<34} {median:7.1f} {median / floor:8.2f} {peak_bytes(work) / 2**20:6.0f}")


if __name__ == "__main__":
    main()
