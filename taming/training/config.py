"""What a user can say about optimisation and about the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from taming.config import Config

Ratio = Annotated[float, Field(ge=0, le=1)]


class OptimizerConfig(Config):
    """Adam with decoupled weight decay; the learning rate is a pure function of the step."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    final_ratio: Ratio = 0.0
    """Share of the learning rate that is left at the last step (cosine and linear)."""

    def shortened(self, share: float) -> Self:
        """For a run of `share` of the steps."""
        return self.model_copy(update={"warmup_steps": round(self.warmup_steps * share)})


class TrainingConfig(Config):
    """When things happen in a run, and on what."""

    output: Path | None = None
    """The run's folder; None means runs/NAME_OF_THE_CONFIG."""
    steps: int = Field(gt=0)
    """Optimiser steps in all."""
    minutes: float | None = Field(None, gt=0)
    """About so long at most: where this machine needs longer for `steps`, a few of which it times before the
    run starts, they and what is counted from them become proportionally fewer. null: as long as it takes."""
    batch_size: int = Field(gt=0)
    """Pictures an optimiser step, over all processes and micro-batches."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches that a step is cut into, to save memory; with the adaptive weight of the whole step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the machine computes it natively, else fp32."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients of each optimiser are scaled down to this norm; None leaves them."""
    ema_decay: Ratio | None = 0.999
    """Decay a step of the averaged weights that are evaluated and saved; None keeps no average."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step in which a loss or a gradient is NaN or infinite, on any process: the run stops
    before the update, or the step is left out and counted."""
    verify_processes_every: int | None = Field(None, gt=0)
    """Compare the bits of all weights over processes every so many steps, and stop where they differ; for
    debugging. null: never."""
    seed: int = 0
    workers: int = Field(0, ge=0)
    """Processes that read pictures, per training process."""
    log_every: int = Field(50, gt=0)
    evaluate_every: int = Field(1000, gt=0)
    preview_every: int = Field(1000, gt=0)
    checkpoint_every: int = Field(1000, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    evaluation_pictures: int | None = Field(None, gt=0)
    """At most so many validation pictures are evaluated; None takes all."""

    @model_validator(mode="after")
    def _divides(self) -> TrainingConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}; "
                f"use batch_size {self.accumulation * (self.batch_size // self.accumulation + 1)} "
                "or another accumulation"
            )
        return self
