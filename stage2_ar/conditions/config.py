"""The union of all conditions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from taming.config import Config

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class NoConditionConfig(Config):
    """Pictures of their own accord: one start token."""

    kind: Literal["none"] = "none"
    start_token: int | None = Field(
        None,
        ge=0,
        description="None: a learned one; a number: that entry of the transformer's table (published)",
    )


class ClassConditionConfig(Config):
    """One label for the whole picture, as one prefix position."""

    kind: Literal["class"] = "class"
    num_classes: int = Field(ge=1)
    dropout: Probability = Field(0.1, description="share of samples that train without it, for guidance")
    shared_vocabulary: bool = Field(
        False, description="published models: the class number is an entry of the transformer's table"
    )


class SegmentationConditionConfig(Config):
    """A label a pixel."""

    kind: Literal["segmentation"] = "segmentation"
    num_labels: int = Field(ge=1)
    placement: Literal["aligned", "prefix"] = Field(
        "aligned",
        description="added to the input that predicts each cell, or h * w positions before the codes",
    )
    label_dim: int = Field(16, ge=1)
    hidden_width: int = Field(128, ge=1)
    context_layers: int = Field(
        2, ge=0, description="3x3 convolutions over the cells, so that each knows its surroundings"
    )
    dropout: Probability = Field(0.1, description="share of samples that train without it, for guidance")


ConditionConfig = Annotated[
    NoConditionConfig | ClassConditionConfig | SegmentationConditionConfig, Field(discriminator="kind")
]
