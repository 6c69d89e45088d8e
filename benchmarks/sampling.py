"""Cached sampling of 256 codes, vocabulary 1024, top-k 100: codes a second, and what was promised of them.

    python benchmarks/sampling.py [--size small large] [--codes 256] [--repeats 3] [--best]

small = 8 layers, width 512; large = 24 layers, width 1024. All contenders of one size, batches 1 and 8, with
guidance and without, run in turn in one process with the same draws; ratios are to be read. `--codes 48` is
quick: it times the first 48 of them. Rates are medians of the repeats, `--best` takes the best ones (a
machine with other work). The floor is one read of all weights in fp32, and of the keys and values so far, at
the rate at which a matrix of 256 MB is read in that minute; "own floor" is at the rate of a matrix as large
as the model, part of which may rest in a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import (
    SIZES,
    VOCABULARY,
    PublishedGPT,
    our_gpt,
    print_table,
    read_bandwidth,
)
from stage2_ar.sampling.inference import for_inference
from stage2_ar.sampling.sample import SamplingSettings, draw, picture_uniforms, sample_codes
from stage2_ar.transformer import Transformer
from taming.types import Prefix

CELLS = 256
SETTINGS = SamplingSettings(top_k=100)
PRECISIONS = ("fp32", "bf16", "int8")


class _EnoughError(Exception):
    """Stops sampling once as many codes as asked for are timed."""


def run_ours(model: Transformer, batch: int, codes: int, settings: SamplingSettings = SETTINGS) -> float:
    start_token = model.token_embedding.weight[0].detach().expand(batch, 1, -1)
    prefix = Prefix(start_token, torch.ones(batch, 1, dtype=torch.bool))
    null = replace(prefix, embeddings=-start_token)
    uniforms = picture_uniforms(0, 0, batch, CELLS)

    def stop(done: int, total: int) -> None:
        if done == codes:
            raise _EnoughError

    start = time.perf_counter()
    with contextlib.suppress(_EnoughError):
        sample_codes(model, prefix, null, (16, 16), uniforms, settings, progress=stop)
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


def floor_rate(model: Transformer, codes: int, bandwidth: float) -> float:
    """Codes a second at batch 1 if nothing but one read in fp32 took time."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name)
    cache = model.config.num_layers * 2 * model.config.width * codes / 2
    return bandwidth / ((weights + cache) * 4)


def prepare(ours: Transformer, precision: str, rows: int) -> Transformer:
    if precision == "int8":
        return for_inference(ours, torch.float32, rows, "int8")
    return for_inference(ours, torch.float32 if precision == "fp32" else torch.bfloat16, rows)


def contenders_of(size: str) -> tuple[Transformer, dict[str, Callable[[int], float]]]:
    """Each takes how many codes to time, and returns codes a second."""
    ours = our_gpt(size, prefix_length=256).eval()
    layers, width, heads = SIZES[size]
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=512, n_embd=width, n_layer=layers, n_head=heads,
            activation_function="gelu", bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    runs: dict[str, Callable[[int], float]] = {
        f"GPT-2, batch {batch}": partial(run_gpt2, gpt2, batch) for batch in (1, 8)
    }
    for precision in PRECISIONS:
        for batch in (1, 8):
            runs[f"{precision}, batch {batch}"] = partial(run_ours, prepare(ours, precision, batch), batch)
        runs[f"{precision}, guided"] = partial(
            run_ours, prepare(ours, precision, 2), 1, settings=replace(SETTINGS, guidance_scale=2.0)
        )
    return ours, runs


def bench(size: str, codes: int, repeats: int, best: bool) -> tuple[list[str], list[list[str]]]:
    """A row of rates, and the rows of what was promised."""
    ours, runs = contenders_of(size)
    for run in runs.values():
        run(4)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    bandwidths, own_bandwidths = [], []
    megabytes = sum(parameter.numel() for parameter in ours.parameters()) * 4 // 2**20
    for _ in range(repeats):
        bandwidths.append(read_bandwidth())
        own_bandwidths.append(read_bandwidth(megabytes))
        for name, run in runs.items():
            rates[name].append(run(codes))
    pick = max if best else statistics.median
    rate = {name: pick(values) for name, values in rates.items()}
    floor, own = (floor_rate(ours, codes, pick(values)) for values in (bandwidths, own_bandwidths))
    published = run_published(PublishedGPT(ours).eval(), 1, 4 if size == "small" else 1)
    shown = [f"{rate[name]:.1f}" for name in runs]
    row = [size, f"{published:.2f}", *shown, f"{floor:.0f}", f"{own:.0f}"]
    return row, [
        [
            f"{size}: {what}",
            f"{value:.2f}",
            f"{'>=' if at_least else '<='} {bar}" if bar else "",
            verdict(value, bar, at_least),
        ]
        for what, value, bar, at_least in promises(size, rate, floor, own)
    ]


def promises(
    size: str, rate: dict[str, float], floor: float, own: float
) -> list[tuple[str, float, float | None, bool]]:
    """What is compared, its value, its bar (None: shown only), and whether more is better."""
    shares = {"large": {"fp32": 0.8, "bf16": 1.0}, "small": {"fp32": 0.45, "int8": 0.6}}[size]
    lines: list[tuple[str, float, float | None, bool]] = []
    for precision in PRECISIONS:
        one = rate[f"{precision}, batch 1"]
        lines.append((f"{precision} of the fp32 floor", one / floor, shares.get(precision), True))
        lines.append((f"{precision} of the fp32 own floor", one / own, None, True))
    for precision in PRECISIONS:
        ratio = rate[f"{precision}, batch 8"] / rate[f"{precision}, batch 1"]
        lines.append((f"{precision}, batch 8 to batch 1", ratio, {"small": 6, "large": 3}[size], True))
    for precision in PRECISIONS:
        cost = rate[f"{precision}, batch 1"] / rate[f"{precision}, guided"]
        lines.append((f"{precision}, guidance costs", cost, 1.6, False))
    for batch in (1, 8):
        ratio = rate[f"fp32, batch {batch}"] / rate[f"GPT-2, batch {batch}"]
        lines.append((f"fp32 to GPT-2, batch {batch}", ratio, None, True))
    lines.append(("int8 to bf16, batch 1", rate["int8, batch 1"] / rate["bf16, batch 1"], 1, True))
    return lines


def verdict(value: float, bar: float | None, at_least: bool) -> str:
    if bar is None:
        return ""
    return "met" if (value >= bar if at_least else value <= bar) else "not met"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--codes", type=int, default=CELLS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--best", action="store_true", help="the best of the repeats, not the median")
    arguments = parser.parse_args()
    results = [bench(size, arguments.codes, arguments.repeats, arguments.best) for size in arguments.size]
    names = [f"GPT-2, batch {batch}" for batch in (1, 8)]
    for precision in PRECISIONS:
        names += [f"{precision}, batch 1", f"{precision}, batch 8", f"{precision}, guided"]
    columns = ["as published", *names, "fp32 floor, batch 1", "own floor"]
    sizes = [row[0] for row, _ in results]
    rates = [[name, *(row[number + 1] for row, _ in results)] for number, name in enumerate(columns)]
    title = f"Sampling, codes/s, first {arguments.codes} of 256, {torch.get_num_threads()} threads"
    print_table(title, ["", *sizes], rates)
    print_table("Promised", ["", "measured", "bar", ""], [line for _, lines in results for line in lines])


if __name__ == "__main__":
    main()
