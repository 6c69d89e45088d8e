"""Sliding window over a 32 x 64 grid, large model, segmentation-like prefix of 256 positions: codes a second.

    python benchmarks/sliding_window.py [--size large] [--repeats 1]

Greedy. Only row 16, a middle one, is drawn; all other cells are given (the upper rows of a picture are
cheaper). "as published" runs 511 inputs for each code, without a cache: it is timed on a few of the row's
cells, and must draw the codes that ours drew there in fp32. The published arithmetic is fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.as_published_gpt import SIZES, VOCABULARY, PublishedGPT, interleaved, our_gpt, print_table
from stage2_ar.conditions import crop_prefix
from stage2_ar.inference import for_inference
from stage2_ar.sampling import SamplingSettings, picture_uniforms
from stage2_ar.sliding_window import Schedule, place_windows, sample_sliding
from stage2_ar.transformer import Transformer
from taming.types import Prefix

GRID, WINDOW, ROW = (32, 64), (16, 16), 16
GREEDY = SamplingSettings(greedy=True)


def run_ours(
    model: Transformer, condition: Tensor, given: Tensor, stride: int, schedule: Schedule
) -> tuple[Tensor, float]:
    embeddings = model.token_embedding(condition.flatten(1)).detach()
    whole = Prefix(embeddings, torch.ones(embeddings.shape[:2], dtype=torch.bool), segments=(GRID,))
    mask = torch.ones(1, *GRID, dtype=torch.bool)
    mask[:, ROW] = False
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
    return codes, GRID[1] / (time.perf_counter() - start)


@torch.inference_mode()
def run_published(model: PublishedGPT, condition: Tensor, codes: Tensor, columns: list[int]) -> float:
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
    parser.add_argument("--published-cells", type=int, default=4)
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
    codes, _ = run_ours(exact, condition, given, 1, "serial")
    half_window = GRID[1] // 2
    columns = list(range(half_window, half_window + arguments.published_cells))
    run_published(published, condition, codes, columns[:1])
    contenders: dict[str, Callable[[], float]] = {
        "as published, fp32": lambda: run_published(published, condition, codes, columns),
        "exact, fp32": lambda: run_ours(exact, condition, given, 1, "serial")[1],
        "exact, bf16": lambda: run_ours(half, condition, given, 1, "serial")[1],
        "stride 8, fp32": lambda: run_ours(exact, condition, given, 8, "serial")[1],
        "stride 8, bf16": lambda: run_ours(half, condition, given, 8, "serial")[1],
    }
    if arguments.wavefront:
        contenders["exact by wavefront, bf16"] = lambda: run_ours(half, condition, given, 1, "wavefront")[1]
    rates = interleaved(contenders, arguments.repeats)
    base = rates["as published, fp32"]
    title = f"Sliding window, {arguments.size}, row {ROW} of 32 x 64, {torch.get_num_threads()} threads"
    rows = [[name, f"{rate:.2f}", f"{rate / base:.1f}"] for name, rate in rates.items()]
    print_table(title, ["", "codes/s", "x published"], rows)


if __name__ == "__main__":
    main()
