"""What a published transformer's condition, order and size are in our words.

Functions that find something worth knowing append it to `notes`.

Axes: h w cells, P prefix positions, N cells in the order of writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stage1_vq import VQModel
from stage2_ar.conditions.config import (
    ClassConditionConfig,
    CodesConditionConfig,
    CoordinatesConditionConfig,
    NoConditionConfig,
    SingleCondition,
)
from stage2_ar.conditions.objects_config import ObjectsConditionConfig, ObjectTokensConfig
from stage2_ar.conditions.tokenizers import facts_of
from stage2_ar.interop.mingpt import ImportedGPT
from stage2_ar.interop.published_config import (
    CodesOf,
    CoordinateTokens,
    Labels,
    ObjectTokens,
    PublishedCondition,
    StartToken,
)
from stage2_ar.order import Grid, OrderConfig, cells_in_order, inverse
from taming.errors import ArtifactError, ConfigError

SHUFFLES = ("permuter.forward_shuffle_idx", "permuter.backward_shuffle_idx")
NAMED_ORDERS = ("raster", "alternating", "z_curve", "subsample", "spiral_out", "spiral_in")
PUBLISHED_OBJECTS = 30
"""Objects of a layout, where the file does not say how many."""


def grid_of(
    stage: PublishedCondition,
    second: VQModel | None,
    first: VQModel,
    gpt: ImportedGPT,
    size: tuple[int, int] | None,
    permuter_grid: Grid | None,
    notes: list[str],
) -> Grid:
    """(h, w) cells that a transformer was trained on.

    They are those of `size` in pixels, else the order's, else those of the tokenizer's resolution, else the
    square that fills the block. Raises ConfigError for a size that does not divide into cells.
    """
    factor = first.spec.downsample_factor
    if size is not None:
        if size[0] % factor or size[1] % factor or min(size) < factor:
            raise ConfigError(
                f"size {size[0]}x{size[1]} does not divide into cells of {factor}x{factor} pixels; give "
                f"{max(size[0] // factor, 1) * factor}x{max(size[1] // factor, 1) * factor}"
            )
        return size[0] // factor, size[1] // factor
    if permuter_grid is not None:
        return permuter_grid
    block, side = gpt.config.block_size, max(first.config.resolution // factor, 1)
    assert block is not None
    own_factor = factor if second is None else second.spec.downsample_factor
    room = block - _sequence_length(stage, (side, side), own_factor)
    if room < 0:
        # The last code is never an input, so that its place may be missing.
        filling = (
            n for n in range(1, side) if _sequence_length(stage, (n, n), own_factor) in (block, block - 1)
        )
        side = next(filling, side)
        notes.append(
            f"taken to be trained on pictures of {side * factor}x{side * factor}, which fill its {block} "
            "positions; --size HxW says another"
        )
    elif room > 1:
        notes.append(
            f"taken to be trained on pictures of {side * factor}x{side * factor}, the resolution of its "
            f"tokenizer; it has {room} positions more: --size HxW says another"
        )
    return side, side


def order_of(
    shuffles: Mapping[str, Tensor], grid: Grid, kind: str, source: Path, notes: list[str]
) -> OrderConfig:
    """The checkpoint's order: its indices decide, whatever the file calls it. Raises ArtifactError."""
    if not shuffles:
        if kind != "Identity":
            raise ArtifactError(
                f"checkpoint {source} has no {SHUFFLES[0]}, though the YAML file names the permuter {kind}; "
                "the order would be a guess: give the file that came with this checkpoint"
            )
        return OrderConfig()
    unknown = shuffles.keys() - set(SHUFFLES)
    forward = shuffles.get(SHUFFLES[0])
    if forward is None or unknown or forward.is_floating_point():
        raise ArtifactError(
            f"checkpoint {source}: the permuter's tensors are {', '.join(sorted(shuffles))}; known are the "
            f"whole numbers {' and '.join(SHUFFLES)}"
        )
    cells, count = forward.flatten().long(), grid[0] * grid[1]
    if len(cells) != count:
        raise ArtifactError(
            f"checkpoint {source}: its order has {len(cells)} cells, and a picture of "
            f"{grid[0]}x{grid[1]} cells {count}; give the size that it was trained on as --size HxW"
        )
    if not torch.equal(cells.sort().values, torch.arange(count)):
        raise ArtifactError(f"checkpoint {source}: {SHUFFLES[0]} does not hold each of 0 to {count - 1} once")
    backward = shuffles.get(SHUFFLES[1])
    if backward is not None and not torch.equal(backward.flatten().long(), inverse(cells)):
        notes.append(f"{SHUFFLES[1]} is not the inverse of the order; the inverse is taken")
    for name in NAMED_ORDERS:
        order = OrderConfig.model_validate({"kind": name})
        if torch.equal(cells_in_order(order, grid), cells):
            return order
    return OrderConfig(kind="given", cells=tuple(cells.tolist()))


def condition_of(
    stage: PublishedCondition, second: VQModel | None, first: VQModel, gpt: ImportedGPT, notes: list[str]
) -> SingleCondition:
    """Our condition, whose tokens are entries of the table; `second` is the condition's tokenizer.

    Raises ConfigError where tokens lie outside of the table or cells are of another size.
    """
    table, factor = gpt.config.table_size, first.spec.downsample_factor
    assert table is not None
    match stage:
        case StartToken(token):
            if not 0 <= token < table:
                raise ConfigError(f"sos_token {token} is no entry of the table, which has 0 to {table - 1}")
            return NoConditionConfig(start_token=token)
        case Labels(count):
            if not 1 <= count <= table:
                raise ConfigError(
                    f"n_classes {count} does not fit the table of {table} entries: each class is one of them"
                )
            return ClassConditionConfig(num_classes=count, shared_vocabulary=True)
        case CoordinateTokens(levels, own_factor):
            if own_factor != factor:
                raise ConfigError(
                    f"down_factor {own_factor} of the coordinates is not the tokenizer's downsample factor, "
                    f"{factor}"
                )
            if not 1 <= levels <= table:
                raise ConfigError(
                    f"n_embed {levels} of the coordinates is not between 1 and the table's {table} entries"
                )
            return CoordinatesConditionConfig(levels=levels)
        case ObjectTokens():
            return _objects(stage, table, notes)
        case CodesOf():
            assert second is not None
            if second.spec.codebook_size > table:
                raise ConfigError(
                    f"the condition has {second.spec.codebook_size} codes and the shared table only {table} "
                    "entries; they do not belong together"
                )
            if stage.resize is None and second.spec.downsample_factor != factor:
                raise ConfigError(
                    f"the condition's tokenizer makes a cell of {second.spec.downsample_factor} pixels and "
                    f"the picture's one of {factor}; only equal ones can be imported"
                )
            return CodesConditionConfig(
                facts=facts_of(second), placement="prefix", resize=stage.resize, shared_vocabulary=True
            )


def _objects(stage: ObjectTokens, table: int, notes: list[str]) -> ObjectsConditionConfig:
    num_tokens, max_objects = stage.num_tokens or table, stage.max_objects or PUBLISHED_OBJECTS
    notes.append("objects have the numbers of the training's data as labels: the checkpoint has no names")
    if None in (stage.num_tokens, stage.max_objects, stage.crop):
        notes.append(
            f"the file's data section does not say all of the layout: as published, {max_objects} objects, "
            f"{num_tokens} tokens and the crop are taken"
        )
    return ObjectsConditionConfig(
        num_classes=num_tokens - 1,
        max_objects=max_objects,
        place=stage.place,
        encoding=ObjectTokensConfig(num_tokens=num_tokens, crop=stage.crop is not False),
        dropout=0.0,
    )


def _sequence_length(stage: PublishedCondition, grid: Grid, own_factor: int) -> int:
    """Prefix and codes without the last, on a grid; `own_factor` is the condition's downsample factor."""
    cells = grid[0] * grid[1]
    match stage:
        case StartToken() | Labels():
            prefix = 1
        case ObjectTokens():
            each = 3 if stage.place == "box" else 2
            prefix = each * (stage.max_objects or PUBLISHED_OBJECTS) + 2 * (stage.crop is not False)
        case CodesOf(resize=int(resize)):
            prefix = (resize // own_factor) ** 2
        case CodesOf() | CoordinateTokens():
            prefix = cells
    return prefix + cells - 1
