"""A training run of stage one, from its config."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stage1_vq.config import VQTrainConfig
from stage1_vq.inputs import check_input
from stage1_vq.model import VQModel, build_decoder
from stage1_vq.task import VQTask
from taming.data.dataset import PictureDataset
from taming.data.source import open_splits
from taming.errors import UserError
from taming.gan.discriminators import build_discriminator
from taming.training.calibrate import fitted, seconds_per_step, steps_of_run
from taming.training.distributed import check_launch
from taming.training.memory import parameter_storages, saved_bytes, state_bytes, without_values
from taming.training.run import RunResult, run_training
from taming.training.sharding import refuse_sharding
from taming.units import format_bytes


def train(
    config: VQTrainConfig,
    run: Path,
    *,
    resume: str = "auto",
    splits: tuple[PictureDataset, PictureDataset] | None = None,
) -> RunResult:
    """Train a codebook in the folder `run`. Raises UserError before any long work starts.

    `splits` are the opened training and validation data, where the caller has them already.
    """
    check(config)
    train_data, validation_data = splits or open_splits(config.data)
    config = fit_to_time(config, train_data, steps_of_run(run) if resume != "never" else None)
    return run_training(
        lambda: VQTask(config), config, config.training, train_data, validation_data, run=run, resume=resume
    )


def fit_to_time(config: VQTrainConfig, data: PictureDataset, steps: int | None = None) -> VQTrainConfig:
    """`config` with as many steps as fit into training.minutes here, or `steps` where a run has begun."""

    def seconds() -> float:
        discriminator = config.discriminator
        alone = config.model_copy(update={"discriminator": None})
        without = seconds_per_step(VQTask(alone), config.training, data)
        if discriminator is None:
            return without
        at_once = {"start_step": 0, "start_on_plateau": None, "warmup_steps": 0, "ramp_steps": 0}
        both = config.model_copy(update={"discriminator": discriminator.model_copy(update=at_once)})
        share = min(discriminator.start_step / config.training.steps, 1.0)
        return share * without + (1 - share) * seconds_per_step(VQTask(both), config.training, data)

    return fitted(config, steps, seconds)


def check(config: VQTrainConfig) -> None:
    """Whether data and model fit, and the launcher's wishes. Raises UserError."""
    check_launch()
    refuse_sharding("an autoencoder")
    factor = config.model.downsample_factor
    for name, pixels in zip(("height", "width"), config.data.height_width, strict=True):
        if pixels % factor:
            raise UserError(
                f"data.size: {name} {pixels} is not divisible by the model's downsample factor {factor}; "
                f"use {max(pixels // factor, 1) * factor} or {(pixels // factor + 1) * factor}"
            )
    check_input(config.model, config.data.gives)
    _check_decoder(config)
    if config.discriminator is not None:
        reason = config.discriminator.network.unsuited(*config.data.height_width)
        if reason is not None:
            raise UserError(f"data.size: {reason}")


def _check_decoder(config: VQTrainConfig) -> None:
    """Whether the decoder can be built, and paints pictures of the data's size."""
    height, width = config.data.height_width
    with torch.device("meta"):
        decoder = build_decoder(config.model)
    try:
        decoder.check_size(height, width)
    except UserError as error:
        side = config.model.resolution
        way = f"set data.size={side}" + (f" or model.resolution={height}" if height == width else "")
        raise UserError(
            f"data.size {height}x{width} does not suit a decoder of kind {config.model.decoder.kind} for "
            f"model.resolution {side} ({error}); {way}"
        ) from None


def describe(config: VQTrainConfig) -> dict[str, str]:
    """What a config amounts to: sizes, parameters, memory."""
    check(config)
    height, width = config.data.height_width
    factor, training = config.model.downsample_factor, config.training
    with FakeTensorMode():
        model = without_values(lambda: VQModel(config.model))
        networks: list[torch.nn.Module] = [model]
        if config.discriminator is not None:
            kind = config.discriminator.network
            networks.append(
                without_values(
                    lambda: build_discriminator(kind, config.model.in_channels, size=(height, width))
                )
            )
        micro_batch = max(training.batch_size // training.accumulation, 1)
        for network in networks:
            network.eval()  # k-means and revival look at values
        model.decoder.train()
        images = torch.zeros(micro_batch, config.model.in_channels, height, width)
        kept = {storage for network in networks for storage in parameter_storages(network)}
        activations = saved_bytes(lambda: [network(images) for network in networks], kept)
    state = state_bytes(model, ema=training.ema_decay is not None) + sum(map(state_bytes, networks[1:]))
    parameters = [sum(p.numel() for p in network.parameters()) for network in networks]
    facts = {
        "parameters": f"{parameters[0]:,} autoencoder"
        + (f", {parameters[1]:,} discriminator" if parameters[1:] else ""),
        "picture": f"{height}x{width}",
        "latent grid": f"{height // factor}x{width // factor} (f{factor})",
        "sequence length": f"{height // factor * (width // factor)} codes of {model.spec.codebook_size}",
        "batch": f"{training.batch_size} pictures a step in {training.accumulation} micro-batch(es)",
        "memory in fp32": f"about {format_bytes(state + activations)}: {format_bytes(state)} weights and "
        f"optimiser, {format_bytes(activations)} activations; about half of the latter in bf16",
    }
    if config.loss.perceptual_weight:
        facts["memory in fp32"] += "; the perceptual network comes on top"
    return facts
