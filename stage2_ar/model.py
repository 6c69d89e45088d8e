"""The transformer and its condition as one module: what stage two trains and saves."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from stage2_ar.conditions import build_condition
from stage2_ar.conditions.base import Condition
from stage2_ar.config import ARModelConfig
from stage2_ar.order import Grid, to_raster, to_sequence
from stage2_ar.transformer import build_transformer
from stage2_ar.transformer_config import LlamaConfig
from taming.artifact import load_artifact, save_artifact
from taming.building import build_with
from taming.config import build_config
from taming.errors import ConfigError
from taming.types import Batch

ARTIFACT_KIND = "ar_transformer"


class ARModel(nn.Module):
    """Codes and a condition in, logits of every code out."""

    def __init__(self, config: ARModelConfig) -> None:
        super().__init__()
        self.config = config
        self.condition = build_condition(
            config.condition, width=config.transformer.width, downsample_factor=config.downsample_factor
        )
        _check_window(config, self.condition)
        self.transformer = build_transformer(
            config.transformer,
            vocabulary_size=config.vocabulary_size,
            grid=config.grid,
            prefix_length=self.condition.prefix_length(config.grid),
            order=config.order,
        )
        self.condition.attach(self.transformer.token_embedding)

    def forward(self, codes: Tensor, batch: Batch, order: Tensor | None = None) -> Tensor:
        """Teacher forcing: codes (B, h, w) int64 and their batch of conditions -> logits (B, h * w, V).

        Logits are by raster index. They are predicted in `order` (h * w,) or (B, h * w), by default the
        model's own.
        """
        grid: Grid = (codes.shape[1], codes.shape[2])
        prefix = self.condition({**batch, "codes": codes}, grid)
        if order is None and self.config.order.kind == "raster":
            raster_logits: Tensor = self.transformer(codes.flatten(1), prefix, grid)
            return raster_logits
        if order is None:
            order = self.transformer.sequence_cells(grid, codes.device)
        logits: Tensor = self.transformer(to_sequence(codes.flatten(1), order), prefix, grid, order)
        return to_raster(logits, order)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, subfolder: str = "") -> ARModel:
        """Load what `save_pretrained` wrote, in eval mode. Raises ArtifactError."""
        values, state = load_artifact(source, ARTIFACT_KIND, subfolder=subfolder)
        config = build_config(ARModelConfig, values, source=f"config of {source}")
        return build_with(lambda: cls(config), state, source=source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        save_artifact(folder, ARTIFACT_KIND, self.config, self.state_dict())


def _check_window(config: ARModelConfig, condition: Condition) -> None:
    """Raises ConfigError for what does not go with an attention window."""
    transformer = config.transformer
    if not isinstance(transformer, LlamaConfig) or transformer.attention_window is None:
        return
    if config.order.kind != "raster":
        raise ConfigError(
            f"transformer.attention_window goes along rows, and order.kind is {config.order.kind!r}; use "
            "raster, or leave the window out"
        )
    height, width = config.grid
    if condition.prefix_length((height, width)) != condition.prefix_length((2 * height, 2 * width)):
        raise ConfigError(
            f"transformer.attention_window: every cell sees the whole prefix, and that of the condition "
            f"{config.condition.kind!r} grows with the picture; set its placement to aligned"
        )
