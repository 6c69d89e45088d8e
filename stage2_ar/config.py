"""What a user can say about a transformer over codes and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stage2_ar.conditions.config import ConditionConfig, NoConditionConfig
from stage2_ar.order import OrderConfig
from stage2_ar.transformer_config import GPTConfig, LlamaConfig, TransformerConfig
from taming.config import Config
from taming.data.config import FolderDataConfig, ScenesDataConfig, ShardsDataConfig
from taming.training.config import OptimizerConfig, TrainingConfig

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_CELLS = 2**22


class ARModelConfig(Config):
    """A transformer with its condition, and the tokenizer that it writes for; config.json holds it."""

    transformer: TransformerConfig = LlamaConfig()
    condition: ConditionConfig = NoConditionConfig()
    vocabulary_size: Positive
    grid: tuple[Positive, Positive]
    """(h, w) cells of the pictures it was trained on: its window on larger ones."""
    order: OrderConfig = OrderConfig()
    """In which order it writes the cells."""
    downsample_factor: Positive
    tokenizer_hash: str
    """`VQModel.codes_hash` of the tokenizer: no other is accepted, but one with another decoder."""
    any_order: bool = False
    """Trained with random orders up to its last step: it can write in any order, not only in `order`."""

    @model_validator(mode="after")
    def _grid_is_one_of_pictures(self) -> Self:
        # It is the size that a sample has by default, and a file that a stranger made says it.
        if self.grid[0] * self.grid[1] > MAX_CELLS:
            raise ValueError(f"grid {self.grid[0]}x{self.grid[1]} has more than {MAX_CELLS} cells")
        return self


class CodesDataConfig(Config):
    """A folder that `taming vq encode` wrote; it holds its tokenizer."""

    kind: Literal["codes"] = "codes"
    root: Path


class RandomOrderConfig(Config):
    """Random orders of writing that give way to the model's own (Yu et al. 2024, arXiv:2411.00776, RAR).

    Before `start` every sample is written in an order of its own; from there on the share of such samples
    falls linearly, and at `end` it is `final_share`.
    """

    start: Share = Field(0.5, description="share of the training after which random orders become fewer")
    end: Share | None = Field(
        0.75,
        description="share of the training from which on `final_share` is left; null: they become fewer up "
        "to the last step and some are left, so that the model can write in any order (completing a picture "
        "from any cells that are known, say)",
    )
    final_share: Share = Field(0.0, description="share of samples that keep a random order from `end` on")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.end is not None and self.end < self.start:
            raise ValueError(f"end {self.end} comes before start {self.start}; give start <= end <= 1")
        if self.end is None and self.final_share == 0:
            raise ValueError(
                "end: null keeps some random orders to the last step: set final_share above 0, 0.25 say"
            )
        return self


class MemorisationConfig(Config):
    """When a training says that it has begun to learn its pictures by heart (stage2_ar.memorisation)."""

    gap: float = Field(
        0.2,
        gt=0,
        description="share of the held-out bits per code by which training pictures may cost less",
    )
    rise: float = Field(
        0.01,
        gt=0,
        description="share by which held-out bits may rise above their lowest while the training ones fall",
    )


class AROptimizerConfig(OptimizerConfig):
    """AdamW, or Muon for the matrices of the transformer's blocks."""

    method: Literal["adam", "muon"] = "adam"
    """muon: taming.training.muon for the matrices of the blocks, at the same learning rate; embeddings, head,
    norms and the condition stay with Adam."""


class ARTrainConfig(Config):
    """A training run of stage two."""

    description: str = ""
    """One line for `taming ar configs`."""
    data: Annotated[
        CodesDataConfig | FolderDataConfig | ShardsDataConfig | ScenesDataConfig, Field(discriminator="kind")
    ]
    tokenizer: str | None = None
    """A saved tokenizer: folder, run or hub id. None with data.kind=codes: the one that made the codes."""
    transformer: Annotated[GPTConfig | LlamaConfig, Field(discriminator="kind")] = LlamaConfig()
    condition: ConditionConfig = NoConditionConfig()
    order: OrderConfig = OrderConfig()
    """In which order cells are written; only raster order is for pictures larger than trained on."""
    random_order: RandomOrderConfig | None = None
    """Random orders in training; the transformer needs target_positions. Evaluated is always in `order`."""
    pkeep: float = Field(1.0, gt=0.0, le=1.0)
    """Each input code is kept with this probability, else a random one takes its place (Esser et al. 2021,
    published code); what is to be predicted stays."""
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the target's probability that is spread over all codes. Logged bits are without it."""
    init_from: str | None = None
    """A pipeline (folder, run or hub id) whose weights are the start (stage2_ar.fine_tuning)."""
    train_only: Literal["condition"] | None = None
    """condition: the transformer stays as in init_from, bit for bit."""
    optimizer: AROptimizerConfig
    training: TrainingConfig
    recompute: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: about an eighth of the
    memory for 1.4 times the time (4 blocks of width 256 on a CPU); the gradients are the same."""
    compile: bool = False
    """torch.compile the blocks in training; needs a C++ compiler, or Triton on a GPU. Meant for GPUs: on
    a CPU steps do not become shorter."""
    memorisation: MemorisationConfig | None = MemorisationConfig()
    """With each evaluation also measure as many training pictures, un-augmented, and warn where they become
    too probable; null: measure held-out ones only."""
    keep: Literal["last", "best"] = "last"
    """Which weights are saved as the model: those of the last step, or of the evaluation with the lowest
    held-out loss so far. A resumed run goes on from its last step in either case."""

    def shortened(self, steps: int) -> ARTrainConfig:
        """The same training in `steps` steps: the warm-up keeps its share of the whole."""
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"steps": steps}),
                "optimizer": self.optimizer.shortened(steps / self.training.steps),
            }
        )

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.random_order is not None and not self.transformer.target_positions:
            raise ValueError(
                "random_order needs a transformer that is told which cell it predicts; set "
                "transformer.target_positions to true, or leave random_order out"
            )
        if self.train_only is not None and self.init_from is None:
            raise ValueError(
                f"train_only {self.train_only} holds the rest of a model still: say which with init_from"
            )
        return self
