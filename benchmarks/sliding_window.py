"""Any size: codes a second on a 64 x 64 grid, large model, segmentation-like prefix of 256 positions.

    python benchmarks/sliding_window.py [--size large] [--repeats 1] [--columns 32]

Greedy. Of the sliding window only the left half of row 32 is drawn, where the window rests as often as in a
whole row; all other cells are given (upper rows are cheaper, lower ones dearer). "as published" runs 511
inputs for each code, without a cache: it is timed on a few of these cells, and must draw the codes that ours
drew there in fp32. The published arithmetic is fp32.

"attention window" is a transformer of the same depth and width that was built with a window of (8, 7): its
cost does not depend on the place, so it writes from the first cell on and is timed when as many rows as
there will ever be go forward together.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import SIZES, VOCABULARY, PublishedGPT, interleaved, our_gpt, print_table
from stage2_ar.conditions import crop_prefix
from stage2_ar.sampling.inference import for_inference
from stage2_ar.sampling.sample import SamplingSettings, picture_uniforms
from stage2_ar.sampling.sliding_window import Schedule, place_windows, sample_sliding
from stage2_ar.sampling.windowed import sample_windowed
from stage2_ar.transformer import Transformer, build_transformer
from stage2_ar.transformer_config import LlamaConfig
from taming.types import Prefix

GRID, WINDOW, ROW = (64, 64), (16, 16), 32
ATTENTION_WINDOW = (8, 7)
STEPS = 12
"""Of the model with an attention window, that are timed."""
GREEDY = SamplingSettings(greedy=True)


def run_ours(
    model: Transformer, condition: Tensor, given: Tensor, columns: range, stride: int, schedule: Schedule
) -> tuple[Tensor, float]:
    embeddings = model.token_embedding(condition.flatten(1)).detach()
    whole = Prefix(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), segments=(GRID,))
    mask = torch.ones(1, *GRID, dtype=torch.bool)
    mask[:, ROW, columns.start : columns.stop] = False
    start = time.perf_counter()
    codes = sample_sliding(
        model,
        lambda top, left: crop_prefix(whole, top, left, WINDOW),
        None,
        GRID,
        picture_uniforms(0, 0, 1, GRID[0] * GRID[1]),
        GREEDY,
        known=(given, mask),
        schedule=schedule,
        stride=stride,
    )
    return codes, len(columns) / (time.perf_counter() - start)


class _EnoughError(Exception):
    """Stops sampling once as many steps as wanted are timed."""


def windowed_model(size: str) -> Transformer:
    """As many layers and as wide as the others; its aligned condition costs nothing worth a figure."""
    layers, width, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(num_layers=layers, num_heads=heads, width=width, attention_window=ATTENTION_WINDOW)
    return build_transformer(config, vocabulary_size=VOCABULARY, grid=WINDOW, prefix_length=1).eval()


def run_windowed(model: Transformer, schedule: Schedule) -> float:
    """The rate once all rows that go forward together have begun."""
    full = GRID[1] if schedule == "wavefront" else 4
    marks: list[tuple[float, int]] = []

    def watch(done: int, total: int) -> None:
        marks.append((time.perf_counter(), done))
        if len(marks) == full + 1 + STEPS:
            raise _EnoughError

    embeddings = model.token_embedding.weight[:1].detach()[None]
    prefix = Prefix(embeddings, torch.ones(1, 1, dtype=torch.bool))
    uniforms = picture_uniforms(0, 0, 1, GRID[0] * GRID[1])
    with contextlib.suppress(_EnoughError):
        sample_windowed(model, prefix, None, GRID, uniforms, GREEDY, schedule=schedule, progress=watch)
    (begin, before), (end, after) = marks[-1 - STEPS], marks[-1]
    return (after - before) / (end - begin)


@torch.inference_mode()
def run_published(model: PublishedGPT, condition: Tensor, codes: Tensor, columns: range) -> float:
    """The rate over some cells of the row; raises where a code is not the one in `codes`."""
    places = {(place.row, place.column): place for place in place_windows(GRID, WINDOW)}
    seconds = 0.0
    for column in columns:
        place = places[ROW, column]
        rows, window_columns = slice(place.top, place.top + 16), slice(place.left, place.left + 16)
        start = time.perf_counter()
        tokens = torch.cat(
            (condition[:, rows, window_columns].flatten(1), codes[:, rows, window_columns].flatten(1)), 1
        )
        logits = model(tokens[:, :-1])[:, 255:]
        drawn = logits.view(1, 16, 16, -1)[:, ROW - place.top, column - place.left].argmax(-1)
        seconds += time.perf_counter() - start
        if not torch.equal(drawn, codes[:, ROW, column]):
            raise AssertionError(f"column {column}: published {drawn.tolist()}, ours {codes[:, ROW, column]}")
    return len(columns) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="large")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--columns", type=int, default=32, help="of row 32, drawn by the sliding window")
    parser.add_argument("--published-cells", type=int, default=3)
    parser.add_argument("--wavefront", action="store_true", help="also time the wavefront schedule")
    arguments = parser.parse_args()
    ours = our_gpt(arguments.size, prefix_length=256).eval()
    published = PublishedGPT(ours).eval()
    # As many rows as a window has positions: most of the work is to take windows in.
    exact = for_inference(ours, torch.float32, rows=256)
    half = for_inference(ours, torch.bfloat16, rows=256)
    generator = torch.Generator().manual_seed(0)
    condition = torch.randint(VOCABULARY, (1, *GRID), generator=generator)
    given = torch.randint(VOCABULARY, (1, *GRID), generator=generator)
    columns = range(arguments.columns)
    few = columns[-arguments.published_cells :]
    codes, _ = run_ours(exact, condition, given, columns, 1, "serial")
    run_published(published, condition, codes, columns[:1])
    windowed = windowed_model(arguments.size)
    rows = GRID[1] // (ATTENTION_WINDOW[1] + 1) + 1
    windowed_half = for_inference(windowed, torch.bfloat16, rows=1)
    windowed_rows = for_inference(windowed, torch.bfloat16, rows=rows)
    contenders: dict[str, Callable[[], float]] = {
        "as published, fp32": lambda: run_published(published, condition, codes, few),
        "exact, fp32": lambda: run_ours(exact, condition, given, columns, 1, "serial")[1],
        "exact, bf16": lambda: run_ours(half, condition, given, columns, 1, "serial")[1],
        "stride 8, fp32": lambda: run_ours(exact, condition, given, columns, 8, "serial")[1],
        "stride 8, bf16": lambda: run_ours(half, condition, given, columns, 8, "serial")[1],
        "attention window, serial, fp32": lambda: run_windowed(windowed, "serial"),
        "attention window, serial, bf16": lambda: run_windowed(windowed_half, "serial"),
        f"attention window, {rows} rows at once, bf16": lambda: run_windowed(windowed_rows, "wavefront"),
    }
    if arguments.wavefront:
        contenders["exact by wavefront, bf16"] = lambda: run_ours(
            half, condition, given, columns, 1, "wavefront"
        )[1]
    rates = interleaved(contenders, arguments.repeats)
    base = rates["as published, fp32"]
    title = f"Any size, {arguments.size}, {GRID[0]} x {GRID[1]} cells, {torch.get_num_threads()} threads"
    lines = [[name, f"{rate:.2f}", f"{rate / base:.1f}"] for name, rate in rates.items()]
    print_table(title, ["", "codes/s", "x published"], lines)


if __name__ == "__main__":
    main()
