"""The options that every way of painting shares, as keywords; `ARPipeline.__call__` says what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from stage2_ar.sampling.best_of import Scorer
from stage2_ar.sampling.guidance import GuidanceSchedule
from stage2_ar.sampling.sliding_window import Schedule


class SampleOptions(TypedDict, total=False):
    """Keywords of `ARPipeline.__call__` but for conditions, size and known cells."""

    num_images: int
    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float
    guidance_schedule: GuidanceSchedule
    guidance_start: float
    guidance_power: float
    seed: int
    greedy: bool
    known_first: bool | None
    best_of: int
    scorer: Scorer | None
    schedule: Schedule | None
    window_stride: int
    tile: int | None
    batch_size: int
    progress: Callable[[int, int], None] | None
