"""Cached sampling of 256 codes, vocabulary 1024, top-k 100: codes a second.

    python benchmarks/sampling.py [--size small large] [--batch 1 8] [--codes 256] [--repeats 3]

small = 8 layers, width 512; large = 24 layers, width 1024. Contenders of one size and batch run in turn in
one process, with the same draws; ratios are to be read. `--codes 48` is quick: it times the first 48 of them.
The floor is one read of all weights and of the keys and values so far, at the read bandwidth of that minute.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import (
    SIZES,
    VOCABULARY,
    PublishedGPT,
    interleaved,
    our_gpt,
    print_table,
    read_bandwidth,
)
from stage2_ar.inference import for_inference
from stage2_ar.sampling import SamplingSettings, draw, picture_uniforms, sample_codes
from stage2_ar.transformer import Transformer
from taming.types import Prefix

CELLS = 256
SETTINGS = SamplingSettings(top_k=100)


class _EnoughError(Exception):
    """Stops sampling once as many codes as asked for are timed."""


def run_ours(model: Transformer, batch: int, codes: int) -> float:
    start_token = model.token_embedding.weight[0].detach().expand(batch, 1, -1)
    prefix = Prefix(start_token, torch.ones(batch, 1, dtype=torch.bool))
    uniforms = picture_uniforms(0, 0, batch, CELLS)

    def stop(done: int, total: int) -> None:
        if done == codes:
            raise _EnoughError

    start = time.perf_counter()
    with contextlib.suppress(_EnoughError):
        sample_codes(model, prefix, None, (16, 16), uniforms, SETTINGS, progress=stop)
    return batch * codes / (time.perf_counter() - start)


@torch.inference_mode()
def run_gpt2(model: GPT2LMHeadModel, batch: int, codes: int) -> float:
    uniforms = picture_uniforms(0, 0, batch, CELLS)
    start = time.perf_counter()
    cache = StaticCache(config=model.config, max_cache_len=CELLS + 1)
    tokens = torch.zeros(batch, 1, dtype=torch.int64)
    for cell in range(codes):
        position = torch.full((batch, 1), cell)
        logits = model(input_ids=tokens, position_ids=position, past_key_values=cache, use_cache=True).logits
        tokens = draw(logits[:, -1], uniforms[:, cell], SETTINGS)[:, None]
    return batch * codes / (time.perf_counter() - start)


@torch.inference_mode()
def run_published(model: PublishedGPT, batch: int, cells: int) -> float:
    """511 inputs for each code, as the published sampling script has it."""
    uniforms = picture_uniforms(0, 0, batch, CELLS)
    tokens = torch.zeros(batch, 511, dtype=torch.int64)
    start = time.perf_counter()
    for cell in range(cells):
        draw(model(tokens)[:, 255 + cell], uniforms[:, cell], SETTINGS)
    return batch * cells / (time.perf_counter() - start)


def floor_rate(model: Transformer, batch: int, codes: int, bytes_a_number: int, bandwidth: float) -> float:
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    cache = model.config.num_layers * 2 * model.config.width * batch * codes / 2
    return batch * bandwidth / ((weights + cache) * bytes_a_number)


def bench(size: str, batch: int, codes: int, repeats: int) -> list[str]:
    ours = our_gpt(size, prefix_length=256).eval()
    published = PublishedGPT(ours).eval()
    layers, width, heads = SIZES[size]
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=512, n_embd=width, n_layer=layers, n_head=heads,
            activation_function="gelu", bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    exact, half = for_inference(ours, torch.float32, batch), for_inference(ours, torch.bfloat16, batch)
    contenders: dict[str, Callable[[], float]] = {
        "gpt2": lambda: run_gpt2(gpt2, batch, codes),
        "ours": lambda: run_ours(exact, batch, codes),
        "ours bf16": lambda: run_ours(half, batch, codes),
    }
    for run in (
        lambda: run_gpt2(gpt2, batch, 4),
        lambda: run_ours(exact, batch, 4),
        lambda: run_ours(half, batch, 4),
    ):
        run()
    bandwidth = read_bandwidth()
    rates = interleaved(contenders, repeats)
    slow = run_published(published, batch, 4 if size == "small" else 1)
    floor, floor_half = (floor_rate(ours, batch, codes, size_of, bandwidth) for size_of in (4, 2))
    return [
        f"{size}, batch {batch}",
        f"{slow:.2f}",
        f"{rates['gpt2']:.1f}",
        f"{rates['ours']:.1f}",
        f"{rates['ours'] / rates['gpt2']:.2f}",
        f"{rates['ours bf16']:.1f}",
        f"{rates['ours bf16'] / rates['gpt2']:.2f}",
        f"{floor:.0f} / {floor_half:.0f}",
        f"{bandwidth / 1e9:.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--codes", type=int, default=CELLS)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = [
        bench(size, batch, arguments.codes, arguments.repeats)
        for size in arguments.size
        for batch in arguments.batch
    ]
    columns = [
        "", "as published", "GPT-2 static", "ours fp32", "x GPT-2", "ours bf16", "x GPT-2",
        "floor fp32/bf16", "GB/s",
    ]  # fmt: skip
    title = f"Sampling, codes/s, first {arguments.codes} of 256, {torch.get_num_threads()} threads"
    print_table(title, columns, rows)


if __name__ == "__main__":
    main()
