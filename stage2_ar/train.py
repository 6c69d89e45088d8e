"""A training run of stage two, from its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from stage1_vq import VQModel
from stage1_vq.codes import read_index
from stage1_vq.inputs import check_input
from stage2_ar.codes import CodeDataset
from stage2_ar.conditions import build_condition
from stage2_ar.conditions.from_data import fill_in
from stage2_ar.conditions.text import keep_features_in
from stage2_ar.config import ARModelConfig, ARTrainConfig, CodesDataConfig
from stage2_ar.fine_tuning import check_start
from stage2_ar.memorisation import FixedSample
from stage2_ar.task import ARTask, model_config
from taming.data.dataset import PictureDataset
from taming.data.source import open_splits
from taming.errors import UserError
from taming.training.calibrate import fitted, seconds_per_step, steps_of_run
from taming.training.compiler import check_compiler
from taming.training.distributed import check_launch
from taming.training.run import RunResult, run_training
from taming.training.sharding import read_sharding


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
    config = filled_in(config, lambda: train_data)
    check(config, tokenizer, train_data)
    config = fit_to_time(config, tokenizer, train_data, steps_of_run(run) if resume != "never" else None)
    probe = memorisation_probe(config, train_data, validation_data)

    def build_task() -> ARTask:
        task = ARTask(config, tokenizer, train_data.size, probe=probe)
        keep_features_in(task.model.condition, run)
        return task

    return run_training(
        build_task,
        config,
        config.training,
        train_data,
        validation_data,
        run=run,
        resume=resume,
    )


def filled_in(config: ARTrainConfig, data: Callable[[], PictureDataset] | None = None) -> ARTrainConfig:
    """`config` with what its condition takes from the training data: names, a vocabulary, an encoder's facts.

    `data` is only called where it is asked for; by default the pictures are opened then.
    """
    opened = data or (lambda: _open_splits(config)[0])
    return config.model_copy(update={"condition": fill_in(config.condition, opened)})


def fit_to_time(
    config: ARTrainConfig, tokenizer: VQModel, data: PictureDataset, steps: int | None = None
) -> ARTrainConfig:
    """`config` with as many steps as fit into training.minutes here, or `steps` where a run has begun."""
    return fitted(
        config,
        steps,
        lambda: seconds_per_step(ARTask(config, tokenizer, data.size), config.training, data),
    )


def memorisation_probe(
    config: ARTrainConfig, train_data: PictureDataset, validation_data: PictureDataset
) -> FixedSample | None:
    """As many training pictures as held-out ones are evaluated; None where the config wants none."""
    if config.memorisation is None:
        return None
    count = min(len(validation_data), config.training.evaluation_pictures or len(validation_data))
    return FixedSample(train_data, count, config.training.seed)


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
    """Whether the data has what the condition needs, and the rest can work here. Raises UserError."""
    values = model_config(config, tokenizer, data.size)
    tokenizer.check_painted_size(*data.size)  # for previews
    check_options(config, values)
    with torch.device("meta"):
        condition = build_condition(
            values.condition, width=values.transformer.width, downsample_factor=values.downsample_factor
        )
    condition.check_data(data)


def check_options(config: ARTrainConfig, values: ARModelConfig) -> None:
    """Whether a start and a compiler that the config wants are there, and what the launcher asks for goes
    with it. Raises UserError."""
    check_launch()
    read_sharding()
    if config.init_from is not None:
        check_start(values, config.init_from)
    if config.compile:
        check_compiler()
