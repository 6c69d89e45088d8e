"""What a user can say about a transformer over codes and its training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stage2_ar.conditions.config import ConditionConfig, NoConditionConfig
from stage2_ar.order import OrderConfig
from stage2_ar.transformer_config import GPTConfig, LlamaConfig, TransformerConfig
from taming.config import Config
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.training.config import OptimizerConfig, TrainingConfig

Positive = Annotated[int, Field(ge=1)]


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


class CodesDataConfig(Config):
    """A folder that `taming vq encode` wrote; it holds its tokenizer."""

    kind: Literal["codes"] = "codes"
    root: Path


class ARTrainConfig(Config):
    """A training run of stage two."""

    description: str = ""
    """One line for `taming ar configs`."""
    data: Annotated[CodesDataConfig | FolderDataConfig | ScenesDataConfig, Field(discriminator="kind")]
    tokenizer: str | None = None
    """A saved tokenizer: folder, run or hub id. None with data.kind=codes: the one that made the codes."""
    transformer: Annotated[GPTConfig | LlamaConfig, Field(discriminator="kind")] = LlamaConfig()
    condition: ConditionConfig = NoConditionConfig()
    order: OrderConfig = OrderConfig()
    """In which order cells are written; only raster order is for pictures larger than trained on."""
    optimizer: OptimizerConfig
    training: TrainingConfig

    def shortened(self, steps: int) -> ARTrainConfig:
        """The same training in `steps` steps: the warm-up keeps its share of the whole."""
        return self.model_copy(
            update={
                "training": self.training.model_copy(update={"steps": steps}),
                "optimizer": self.optimizer.shortened(steps / self.training.steps),
            }
        )
