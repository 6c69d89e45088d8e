"""A training run of stage two, from its config."""

from __future__ import annotations

from pathlib import Path

import torch

from stage1_vq import VQModel
from stage1_vq.codes import read_index
from stage1_vq.inputs import check_input
from stage2_ar.codes import CodeDataset
from stage2_ar.conditions import build_condition
from stage2_ar.config import ARModelConfig, ARTrainConfig, CodesDataConfig
from stage2_ar.model import ARModel
from stage2_ar.task import ARTask, model_config
from taming.data.dataset import PictureDataset
from taming.data.source import open_splits
from taming.errors import UserError
from taming.training.calibrate import FEWEST_STEPS, FOR_STEPS, seconds_per_step, steps_of_run, steps_within
from taming.training.loop import RunResult, run_training
from taming.training.memory import format_bytes, parameter_storages, saved_bytes, state_bytes


def train(
    config: ARTrainConfig,
    run: Path,
    *,
    resume: str = "auto",
    splits: tuple[PictureDataset, PictureDataset] | None = None,
) -> RunResult:
    """Train a transformer in the folder `run`. Raises UserError before any long work starts.

    `splits` are the opened training and validation data, where the caller has them already.
    """
    tokenizer = load_tokenizer(config)
    train_data, validation_data = splits or _open_splits(config)
    check(config, tokenizer, train_data)
    config = fit_to_time(config, tokenizer, train_data, steps_of_run(run) if resume != "never" else None)
    return run_training(
        lambda: ARTask(config, tokenizer, train_data.size),
        config,
        config.training,
        train_data,
        validation_data,
        run=run,
        resume=resume,
    )


def fit_to_time(
    config: ARTrainConfig, tokenizer: VQModel, data: PictureDataset, steps: int | None = None
) -> ARTrainConfig:
    """`config` with as many steps as fit into training.minutes here, or `steps` where a run has begun."""
    if config.training.minutes is None or config.training.steps <= FEWEST_STEPS:
        return config
    if steps is None:
        seconds = seconds_per_step(ARTask(config, tokenizer, data.size), config.training, data)
        steps = steps_within(FOR_STEPS * 60 * config.training.minutes, seconds, config.training.steps)
    return config.shortened(steps)


def load_tokenizer(config: ARTrainConfig) -> VQModel:
    """The tokenizer of a config. Raises UserError where none is named, or not the one of the codes."""
    if not isinstance(config.data, CodesDataConfig):
        if config.tokenizer is None:
            raise UserError(
                "tokenizer is missing: pictures need one to become codes; set -o tokenizer=RUN_OF_STAGE_ONE, "
                "or train on the codes that `taming vq encode` writes (data.kind=codes)"
            )
        tokenizer = VQModel.from_pretrained(config.tokenizer)
        check_input(tokenizer.config, config.data.gives)
        return tokenizer
    made_by = read_index(config.data.root).tokenizer_hash
    tokenizer = VQModel.from_pretrained(config.tokenizer or config.data.root / "tokenizer")
    if not tokenizer.makes_codes_of(made_by):
        raise UserError(
            f"the codes in {config.data.root} were made by the tokenizer {made_by[:12]}, not by "
            f"{tokenizer.codes_hash()[:12]}; leave tokenizer out, or encode again with `taming vq encode`"
        )
    return tokenizer


def _open_splits(config: ARTrainConfig) -> tuple[PictureDataset, PictureDataset]:
    """The training and the validation split. Raises UserError where there is nothing to evaluate on."""
    if isinstance(config.data, CodesDataConfig):
        return CodeDataset(config.data.root, "train"), CodeDataset(config.data.root, "validation")
    return open_splits(config.data)


def check(config: ARTrainConfig, tokenizer: VQModel, data: PictureDataset) -> None:
    """Whether the data has what the condition needs. Raises UserError."""
    values = model_config(config, tokenizer, data.size)
    with torch.device("meta"):
        condition = build_condition(
            values.condition, width=values.transformer.width, downsample_factor=values.downsample_factor
        )
    condition.check_data(data)


def describe(config: ARTrainConfig) -> dict[str, str]:
    """What a config amounts to: sizes, parameters, memory. Opens the tokenizer, not the pictures."""
    tokenizer = load_tokenizer(config)
    if isinstance(config.data, CodesDataConfig):
        size = CodeDataset(config.data.root, "train").size
    else:
        size = config.data.height_width
    values, training = model_config(config, tokenizer, size), config.training
    height, width = values.grid
    with torch.device("meta"):
        model = ARModel(values)
    prefix = model.condition.prefix_length(values.grid)
    state = state_bytes(model, ema=training.ema_decay is not None)
    # Layers are alike: one and two of them, for one picture, tell what all keep.
    one, two = (_saved_by(values, layers) for layers in (1, 2))
    micro_batch = max(training.batch_size // training.accumulation, 1)
    activations = micro_batch * (one + (values.transformer.num_layers - 1) * (two - one))
    return {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "picture": f"{size[0]}x{size[1]}",
        "latent grid": f"{height}x{width} (f{values.downsample_factor})",
        "sequence length": f"{prefix + height * width - 1}: {prefix} of the condition, {height * width} "
        f"codes of {values.vocabulary_size}",
        "batch": f"{training.batch_size} pictures a step in {training.accumulation} micro-batch(es)",
        "memory in fp32": f"about {format_bytes(state + activations)}: {format_bytes(state)} weights and "
        f"optimiser, {format_bytes(activations)} activations; about half of the latter in bf16",
    }


def _saved_by(values: ARModelConfig, layers: int) -> int:
    """Bytes that a model of so many layers keeps for the backward pass of one picture."""
    transformer = values.transformer.model_copy(update={"num_layers": layers})
    model = ARModel(values.model_copy(update={"transformer": transformer}))
    batch = model.condition.example(1, values.grid)
    return saved_bytes(
        lambda: model(torch.zeros(1, *values.grid, dtype=torch.int64), batch), parameter_storages(model)
    )
