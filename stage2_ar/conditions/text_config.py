"""What a user can say about text as a condition."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from taming.config import Config


class WordsConfig(Config):
    """Words of a fixed vocabulary, embedded and put into context here: for small data of simple captions."""

    kind: Literal["words"] = "words"
    max_length: int = Field(
        32, ge=1, description="words; training cuts longer captions, sampling refuses them"
    )
    vocabulary: tuple[str, ...] = Field(
        (), description="() is filled in from the training captions when training begins"
    )
    hidden_width: int = Field(128, ge=4)
    context: Literal["attention", "convolution"] = "attention"
    context_layers: int = Field(2, ge=0, description="each lets words see others, later ones included")

    @field_validator("vocabulary")
    @classmethod
    def _once_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a word stands twice in the vocabulary; leave it out to take the data's words")
        return value


class TransformersTextConfig(Config):
    """A text encoder of the transformers library, frozen."""

    kind: Literal["transformers"] = "transformers"
    name: str = Field(description="a folder that save_pretrained wrote, or a hub id")
    max_length: int = Field(77, ge=1, description="tokens; training cuts longer ones, sampling refuses them")
    hidden_size: int | None = Field(
        None, ge=1, description="of its last hidden states; None is filled in when training begins"
    )
    weights_hash: str | None = Field(
        None, description="of weights and vocabulary, filled in when training begins: no other is accepted"
    )
    disk_cache: bool = Field(False, description="keep features of training captions in the run's folder too")


class TextConditionConfig(Config):
    """A caption, as a masked prefix position a word or token."""

    kind: Literal["text"] = "text"
    encoder: Annotated[WordsConfig | TransformersTextConfig, Field(discriminator="kind")] = WordsConfig()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="share of samples that train without it, for guidance"
    )
