"""The union of all conditions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from stage1_vq.config import InputKind
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from stage2_ar.conditions.text_config import TextConditionConfig
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


class PictureConditionConfig(Config):
    """What all conditions that are a picture or a map have."""

    placement: Literal["aligned", "prefix"] = Field(
        "aligned",
        description="added to the input that predicts each cell, or h * w positions before the codes",
    )
    hidden_width: int = Field(128, ge=1)
    context_layers: int = Field(
        2, ge=0, description="3x3 convolutions over the cells, so that each knows its surroundings"
    )
    dropout: Probability = Field(0.1, description="share of samples that train without it, for guidance")


class SegmentationConditionConfig(PictureConditionConfig):
    """A label a pixel."""

    kind: Literal["segmentation"] = "segmentation"
    num_labels: int = Field(ge=1)
    label_dim: int = Field(16, ge=1)


class DepthConditionConfig(PictureConditionConfig):
    """A map of inverse depth, 1 being nearest."""

    kind: Literal["depth"] = "depth"


class ImageConditionConfig(PictureConditionConfig):
    """A second picture."""

    kind: Literal["image"] = "image"
    source: Literal["condition_image", "low_resolution", "edges"] = Field(
        "condition_image",
        description="the other of a pair (data.condition_image), or what is made of the picture itself",
    )
    channels: int | None = Field(None, ge=1, description="of the second picture; None: 3, and 1 of edges")
    scale: int | None = Field(
        None, ge=2, description="low_resolution: how many times smaller each side of the second picture is"
    )

    @property
    def num_channels(self) -> int:
        return self.channels or (1 if self.source == "edges" else 3)

    @model_validator(mode="after")
    def _check(self) -> ImageConditionConfig:
        if self.source == "low_resolution" and self.scale is None:
            raise ValueError("source low_resolution needs scale: 4 makes each side a quarter")
        if self.source != "low_resolution" and self.scale is not None:
            raise ValueError(f"scale belongs to source low_resolution; leave it out with {self.source}")
        if self.source == "edges" and self.num_channels != 1:
            raise ValueError("edges have one channel; leave channels out")
        return self


class ConditionTokenizerConfig(Config):
    """What a condition keeps of its own tokenizer; filled in when a training begins, and by imports."""

    input: InputKind
    channels: int = Field(ge=1, description="of its input; of segmentation the number of labels")
    codebook_size: int = Field(ge=1)
    downsample_factor: int = Field(ge=1)
    tokenizer_hash: str
    """`VQModel.codes_hash`: no other tokenizer is accepted."""


class CodesConditionConfig(Config):
    """The codes of a second tokenizer: of label maps, depth, edges or second pictures, as it was trained."""

    kind: Literal["codes"] = "codes"
    tokenizer: str | None = Field(
        None, description="of the condition: a saved tokenizer (folder, run or hub id); needed for training"
    )
    facts: ConditionTokenizerConfig | None = Field(None, description="follows from the tokenizer")
    placement: Literal["aligned", "prefix"] = Field(
        "aligned",
        description="added to the input that predicts each cell, or h * w positions before the codes",
    )
    scale: int | None = Field(
        None,
        ge=2,
        description="the second picture is the first one, so many times smaller a side: super-resolution by "
        "a tokenizer of pictures, which sees it enlarged again",
    )
    resize: int | None = Field(
        None, ge=1, description="published downsample_cond_size: each map is brought to so many pixels a side"
    )
    dropout: Probability = Field(0.1, description="share of samples that train without it, for guidance")
    shared_vocabulary: bool = Field(
        False,
        description="published models: a code is that entry of the transformer's table, and there is no null",
    )

    @model_validator(mode="after")
    def _check(self) -> CodesConditionConfig:
        if self.shared_vocabulary and self.placement != "prefix":
            raise ValueError("shared_vocabulary has the codes as positions: set placement: prefix")
        if self.resize is not None and (self.placement != "prefix" or self.scale is not None):
            raise ValueError("resize has cells of its own: set placement: prefix, and leave scale out")
        return self


class CoordinatesConditionConfig(Config):
    """Where each cell lies in the whole picture; filled in by the data and by the pipeline."""

    kind: Literal["coordinates"] = "coordinates"
    frequencies: int = Field(6, ge=1, description="sines and cosines of up to 2^(frequencies - 1) half turns")
    hidden_width: int = Field(64, ge=1)
    dropout: Probability = Field(0.1, description="share of samples that train without it, for guidance")
    levels: int | None = Field(
        None,
        ge=1,
        description="published models: h * w positions round(levels * c), entries of the transformer's table",
    )


SingleCondition = (
    NoConditionConfig
    | ClassConditionConfig
    | SegmentationConditionConfig
    | DepthConditionConfig
    | ImageConditionConfig
    | CodesConditionConfig
    | CoordinatesConditionConfig
    | ObjectsConditionConfig
    | TextConditionConfig
)
"""All but the combination of several."""


class CombinedConditionConfig(Config):
    """Several conditions at once: their prefixes one after another, what they add to cells summed."""

    kind: Literal["combined"] = "combined"
    conditions: list[Annotated[SingleCondition, Field(discriminator="kind")]] = Field(min_length=2)
    dropout: Probability = Field(
        0.1,
        description="share of samples that train without all of them, for guidance; each part's own dropout "
        "leaves out that part alone",
    )

    @field_validator("conditions")
    @classmethod
    def _no_empty_part(cls, value: list[SingleCondition]) -> list[SingleCondition]:
        if any(isinstance(part, NoConditionConfig) for part in value):
            raise ValueError("kind none says nothing beside others; leave it out")
        return value


ConditionConfig = Annotated[SingleCondition | CombinedConditionConfig, Field(discriminator="kind")]
