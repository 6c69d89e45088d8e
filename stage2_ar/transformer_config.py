"""What a transformer can be: two kinds behind one union."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from taming.config import Config

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Common(Config):
    num_layers: int = Field(8, ge=1)
    num_heads: int = Field(8, ge=1)
    width: int = Field(512, ge=4)
    embedding_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    residual_dropout: Probability = 0.0
    target_positions: bool = Field(
        False,
        description="each input is also told which cell it predicts; random orders cannot do without "
        "(Yu et al. 2024, RAR)",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> _Common:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        return self

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


class GPTConfig(_Common):
    """The published transformer: minGPT with learned positions."""

    kind: Literal["gpt"] = "gpt"
    num_unmasked: int = Field(0, ge=0, description="prefix positions that see each other fully")
    block_size: int | None = Field(
        None, ge=1, description="learned positions; None: prefix and cells. Imported weights may have more"
    )
    table_size: int | None = Field(
        None,
        ge=1,
        description="rows of the embedding and of the head; None: the picture's vocabulary. Published models "
        "keep condition tokens and codes in one table, which may be larger than the codebook",
    )


class LlamaConfig(_Common):
    """RMSNorm, SwiGLU, rotary positions over rows and columns, no biases (Touvron et al. 2023)."""

    kind: Literal["llama"] = "llama"
    mlp_width: int | None = Field(None, ge=1, description="None: 8/3 of the width, rounded up to 32")
    qk_norm: bool = Field(True, description="RMSNorm of queries and keys of each head (Dehghani et al. 2023)")
    rotary_base: float = Field(10000.0, gt=1.0)
    zero_init_head: bool = False
    attention_window: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="(rows above, columns to each side) that a cell sees, besides the prefix: pictures of "
        "any size, each cell at one cost. None: all cells before it, on grids up to the one trained on",
    )

    @model_validator(mode="after")
    def _windows_know_no_absolute_places(self) -> LlamaConfig:
        if self.attention_window is not None and self.target_positions:
            raise ValueError(
                "attention_window is for pictures of any size, and target_positions are those of one; "
                "leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _head_dim_has_two_axes(self) -> LlamaConfig:
        if self.head_dim % 4:
            raise ValueError(
                f"width {self.width} / num_heads {self.num_heads} = {self.head_dim} is not divisible by 4, "
                "which rotary positions over rows and columns need"
            )
        return self

    @property
    def hidden_width(self) -> int:
        return self.mlp_width or -(-self.width * 8 // 3 // 32) * 32


TransformerConfig = Annotated[GPTConfig | LlamaConfig, Field(discriminator="kind")]
