"""Published transformers (Lightning checkpoint and YAML) with their tokenizers as one pipeline.

Published models keep condition tokens and codes in one table. Here the condition says so in its config, and
otherwise stands beside the transformer as every other does.

Axes: h w cells, P prefix positions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stage1_vq import VQModel
from stage1_vq.interop.checkpoint import file_hash, read_checkpoint, tensors_of
from stage1_vq.interop.imported import Imported, grouped
from stage1_vq.interop.published_config import Part, read_published
from stage1_vq.interop.taming_transformers import tokenizer_from
from stage2_ar.conditions.config import SingleCondition
from stage2_ar.conditions.tokenizers import parts_with_tokenizer
from stage2_ar.config import ARModelConfig
from stage2_ar.interop.mingpt import ImportedGPT, read_gpt
from stage2_ar.interop.published_config import (
    CodesOf,
    PublishedCondition,
    PublishedTransformer,
    StartToken,
    read_published_transformer,
)
from stage2_ar.interop.translation import condition_of, grid_of, order_of
from stage2_ar.model import ARModel
from stage2_ar.order import Grid, OrderConfig
from stage2_ar.pipeline import ARPipeline
from stage2_ar.transformer import Transformer, build_transformer
from taming.artifact import load_state
from taming.errors import ArtifactError, ConfigError

FIRST_STAGE: Part = "first_stage_model"
CONDITION_STAGE: Part = "cond_stage_model"


@dataclass(frozen=True)
class ImportedPipeline:
    """A published model in ours, and an account of every tensor."""

    pipeline: ARPipeline
    num_used: int
    left_out: Mapping[str, tuple[str, ...]]
    """Reason -> names of the tensors that were not taken."""
    notes: tuple[str, ...]
    origin: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Write the pipeline, and import.json with the account of every tensor."""
        self.pipeline.save_pretrained(folder)
        account = {
            "origin": dict(self.origin),
            "tensors_used": self.num_used,
            "left_out": {reason: list(names) for reason, names in self.left_out.items()},
            "notes": list(self.notes),
        }
        (folder / "import.json").write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")


def import_transformer(
    checkpoint: Path,
    *,
    config: Path | None,
    size: tuple[int, int] | None = None,
    tokenizer: VQModel | None = None,
    condition_tokenizer: VQModel | None = None,
) -> ImportedPipeline:
    """The pipeline in `checkpoint`, described by the YAML file `config`; no code of either is run.

    `size` (H, W) in pixels is what it was trained on: by default what the order's grid tells, or the
    tokenizer's resolution. A bare transformer has no tokenizers with it: `tokenizer` is the picture's, and
    its prefix are the codes of `condition_tokenizer`, or the start token 0 where there is none.
    Raises ArtifactError or ConfigError.
    """
    if config is None:
        raise ConfigError(
            "a transformer's number of heads and its condition do not follow from its weights; give the YAML "
            "file that came with it as --config"
        )
    published = read_published_transformer(config)
    if isinstance(published, PublishedTransformer):
        if tokenizer is not None or condition_tokenizer is not None:
            raise ConfigError(f"{config} brings its own tokenizers; leave --tokenizer out")
        return _with_its_tokenizers(checkpoint, config, published, size)
    if tokenizer is None:
        raise ConfigError(
            f"{config} describes a transformer without a tokenizer; give the pictures' one as --tokenizer"
        )
    tensors = tensors_of(read_checkpoint(checkpoint), checkpoint, "state_dict")
    gpt = read_gpt(tensors, published, checkpoint)
    notes = [*gpt.notes]
    stage: PublishedCondition = StartToken(0)
    if condition_tokenizer is not None:
        stage = CodesOf(CONDITION_STAGE, condition_tokenizer.config.input, None)
    else:
        notes.append("the sequence is taken to begin with the start token 0")
    grid = grid_of(stage, condition_tokenizer, tokenizer, gpt, size, None, notes)
    condition = condition_of(stage, condition_tokenizer, tokenizer, gpt, notes)
    model = _build(gpt, condition, condition_tokenizer, tokenizer, grid, OrderConfig(), checkpoint)
    return ImportedPipeline(
        ARPipeline(model, tokenizer),
        num_used=len(tensors) - len(gpt.masks),
        left_out=grouped(("constant attention masks", name) for name in gpt.masks),
        notes=tuple(notes),
        origin=_origin(checkpoint, config),
    )


def import_gpt(checkpoint: Path, *, config: Path, grid: Grid, prefix_length: int) -> Transformer:
    """A bare published transformer for grids of `grid` (h, w) cells after P prefix positions, in eval mode.

    Its codes are all entries of its table. `config` is the YAML with target ...mingpt.GPT, or that of a
    whole model. Raises ArtifactError or ConfigError.
    """
    published = read_published_transformer(config)
    gpt = published.gpt if isinstance(published, PublishedTransformer) else published
    tensors = tensors_of(read_checkpoint(checkpoint), checkpoint, "state_dict")
    if isinstance(published, PublishedTransformer):
        tensors = _parts(tensors)["transformer"]
    found = read_gpt(tensors, gpt, checkpoint)
    assert found.config.table_size is not None
    transformer = build_transformer(
        found.config, vocabulary_size=found.config.table_size, grid=grid, prefix_length=prefix_length
    )
    load_state(transformer, found.state, source=checkpoint)
    return transformer.eval()


def _with_its_tokenizers(
    checkpoint: Path, config: Path, published: PublishedTransformer, size: tuple[int, int] | None
) -> ImportedPipeline:
    # What can be read without the weights is read first: a wrong file is found before gigabytes are.
    descriptions = {FIRST_STAGE: read_published(config, FIRST_STAGE)}
    stage = published.condition
    if isinstance(stage, CodesOf) and stage.part == CONDITION_STAGE:
        read = read_published(config, CONDITION_STAGE)
        if read.model.input == "image" and stage.key in ("segmentation", "depth"):
            # The condition stage need not say what it is of; the transformer does.
            read = replace(read, model=read.model.model_copy(update={"input": stage.key}))
        descriptions[CONDITION_STAGE] = read
    parts = _parts(tensors_of(read_checkpoint(checkpoint), checkpoint, "state_dict"))
    sha256 = file_hash(checkpoint)
    tokenizers: dict[Part, Imported] = {}
    for part, description in descriptions.items():
        if not parts.get(part):
            raise ArtifactError(
                f"checkpoint {checkpoint} has no {part}, which {config.name} describes; it has "
                f"{', '.join(sorted(parts))}"
            )
        tokenizers[part] = tokenizer_from(
            parts[part], checkpoint, published=description, part=part, sha256=sha256
        )
    if not parts.get("transformer"):
        raise ArtifactError(
            f"checkpoint {checkpoint} has no transformer.* tensors; a tokenizer alone is read by "
            "`taming vq import taming-transformers`"
        )
    gpt = read_gpt(parts["transformer"], published.gpt, checkpoint)
    first = tokenizers[FIRST_STAGE].model
    second = tokenizers[stage.part].model if isinstance(stage, CodesOf) else None
    notes = [*gpt.notes]
    grid = grid_of(stage, second, first, gpt, size, published.permuter_grid, notes)
    order = order_of(parts.get("permuter", {}), grid, published.permuter, checkpoint, notes)
    condition = condition_of(stage, second, first, gpt, notes)
    model = _build(gpt, condition, second, first, grid, order, checkpoint)
    left_out = [("constant attention masks", name) for name in gpt.masks]
    for name, tensors in parts.items():
        if name not in (*tokenizers, "transformer", "permuter"):
            left_out += [("no part of the transformer or its tokenizers", full) for full in tensors]
    for part, imported in tokenizers.items():
        left_out += [(reason, name) for reason, names in imported.left_out.items() for name in names]
        notes += [f"{part}: {note}" for note in imported.notes]
    return ImportedPipeline(
        ARPipeline(model, first),
        num_used=sum(imported.num_used for imported in tokenizers.values())
        + len(parts["transformer"])
        - len(gpt.masks)
        + len(parts.get("permuter", {})),
        left_out=grouped(left_out),
        notes=tuple(notes),
        origin=_origin(checkpoint, config, sha256),
    )


def _parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the part that their full name begins with."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parts.setdefault(name.partition(".")[0], {})[name] = value
    return parts


def _build(
    gpt: ImportedGPT,
    condition: SingleCondition,
    condition_tokenizer: VQModel | None,
    tokenizer: VQModel,
    grid: Grid,
    order: OrderConfig,
    source: Path,
) -> ARModel:
    """The model with its weights. Raises ConfigError where sequence, block and table do not fit."""
    spec, table = tokenizer.spec, gpt.config.table_size
    assert table is not None
    if spec.codebook_size > table:
        raise ConfigError(
            f"the tokenizer has {spec.codebook_size} codes and the transformer's table only {table} entries; "
            "they do not belong together"
        )
    values = ARModelConfig(
        transformer=gpt.config,
        condition=condition,
        vocabulary_size=spec.codebook_size,
        grid=grid,
        order=order,
        downsample_factor=spec.downsample_factor,
        tokenizer_hash=tokenizer.codes_hash(),
    )
    try:
        model = ARModel(values)
    except ConfigError as error:
        raise ConfigError(
            f"checkpoint {source} with pictures of {grid[0] * spec.downsample_factor}x"
            f"{grid[1] * spec.downsample_factor} pixels: {error}; give the size that it was trained on as "
            "--size HxW"
        ) from None
    for part in parts_with_tokenizer(model.condition).values():
        assert condition_tokenizer is not None
        part.attach_tokenizer(condition_tokenizer)
    if gpt.config.num_unmasked > model.condition.prefix_length(grid):
        raise ConfigError(
            f"checkpoint {source}: n_unmasked {gpt.config.num_unmasked} is more than the prefix of "
            f"{model.condition.prefix_length(grid)}: codes would see those after them; only an unmasked "
            "prefix can be imported"
        )
    load_state(model.transformer, gpt.state, source=source)
    return model.eval()


def _origin(checkpoint: Path, config: Path, sha256: str | None = None) -> dict[str, Any]:
    return {
        "program": "taming-transformers",
        "checkpoint": checkpoint.name,
        "config": config.name,
        "sha256": sha256 or file_hash(checkpoint),
    }
