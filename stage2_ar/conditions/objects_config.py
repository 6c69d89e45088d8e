"""What a user can say about a layout of objects as a condition."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from taming.config import Config


class ObjectFeaturesConfig(Config):
    """One prefix position an object: its class, and Fourier features of where it is, through a small MLP."""

    kind: Literal["features"] = "features"
    aligned: bool = Field(True, description="also tell each cell how far boxes of each class cover it")
    frequencies: int = Field(6, ge=1, description="sines and cosines of each coordinate, at 1, 2, 4, ... pi")
    hidden_width: int = Field(128, ge=1)
    context_layers: int = Field(2, ge=0, description="3x3 convolutions over the cells, with aligned")


class ObjectTokensConfig(Config):
    """The published form: whole numbers that are entries of the transformer's own table."""

    kind: Literal["tokens"] = "tokens"
    num_tokens: int = Field(
        ge=4,
        description="entries of the table that tokens may use (published: the 8192 codes); the last one pads",
    )
    crop: bool = Field(True, description="two more tokens say which part of the whole picture is painted")


class ObjectsConditionConfig(Config):
    """Boxes or centre points of objects with their classes. They are a set: their order says nothing."""

    kind: Literal["objects"] = "objects"
    num_classes: int = Field(ge=1)
    names: tuple[str, ...] = Field(
        (), description="of the classes; () is filled in from the data when training begins"
    )
    max_objects: int = Field(30, ge=1, description="training keeps the largest; sampling refuses more")
    place: Literal["box", "centre"] = Field("box", description="what is said of where an object is")
    encoding: Annotated[ObjectFeaturesConfig | ObjectTokensConfig, Field(discriminator="kind")] = (
        ObjectFeaturesConfig()
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="share of samples that train without it, for guidance"
    )

    @model_validator(mode="after")
    def _check(self) -> ObjectsConditionConfig:
        if len(self.names) > self.num_classes:
            raise ValueError(f"{len(self.names)} names are more than num_classes {self.num_classes}")
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"two classes have the name {twice!r}; rename one in the data")
        tokens = self.encoding
        if isinstance(tokens, ObjectTokensConfig) and self.num_classes >= tokens.num_tokens:
            raise ValueError(
                f"num_classes {self.num_classes} must be less than encoding.num_tokens {tokens.num_tokens}: "
                "each class is a token, and one more pads"
            )
        return self
