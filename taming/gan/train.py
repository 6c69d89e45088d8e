"""A training run of a GAN, from its config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from taming.data.dataset import PictureDataset
from taming.data.source import open_splits
from taming.errors import UserError
from taming.gan.config import GANTrainConfig
from taming.gan.task import GANTask, model_config
from taming.training.calibrate import fitted, seconds_per_step, steps_of_run
from taming.training.distributed import check_launch
from taming.training.memory import saved_bytes, state_bytes
from taming.training.run import RunResult, run_training
from taming.training.sharding import refuse_sharding
from taming.units import format_bytes


def train(
    config: GANTrainConfig,
    run: Path,
    *,
    resume: str = "auto",
    splits: tuple[PictureDataset, PictureDataset] | None = None,
) -> RunResult:
    """Train a generator in the folder `run`. Raises UserError before any long work starts.

    `splits` are the opened training and validation data, where the caller has them already.
    """
    check()
    train_data, validation_data = splits or open_splits(config.data)
    check_validation(config, len(validation_data))
    names = train_data.class_names
    model_config(config, names)
    config = fit_to_time(config, train_data, steps_of_run(run) if resume != "never" else None)
    return run_training(
        lambda: GANTask(config, names),
        config,
        config.training,
        train_data,
        validation_data,
        run=run,
        resume=resume,
    )


def fit_to_time(config: GANTrainConfig, data: PictureDataset, steps: int | None = None) -> GANTrainConfig:
    """`config` with as many steps as fit into training.minutes here, or `steps` where a run has begun."""

    def seconds() -> float:
        task = GANTask(config, data.class_names)
        return seconds_per_step(task, config.training, data, cycle=config.discriminator_steps)

    return fitted(config, steps, seconds)


def check() -> None:
    """Whether the launcher's wishes can be met; the config has been checked as a whole. Raises UserError."""
    check_launch()
    refuse_sharding("a GAN")


def check_validation(config: GANTrainConfig, found: int) -> None:
    """Whether there is something to compare samples with. Raises UserError."""
    used = min(found, config.training.evaluation_pictures or found)
    if used < 2:
        raise UserError(
            f"samples are measured against the validation pictures, of which {used} would be used: 2 are the "
            "least, hundreds say something; give more pictures, a larger share (data.validation_fraction) or "
            "a larger training.evaluation_pictures"
        )


def describe(config: GANTrainConfig) -> dict[str, str]:
    """What a config amounts to: sizes, parameters, memory. Opens the data where classes are wanted."""
    check()
    names: Sequence[str] = open_splits(config.data)[0].class_names if config.class_conditional else ()
    height, width = config.data.height_width
    training = config.training
    with torch.device("meta"):
        task = GANTask(config, names)
    # What a generator sees follows a schedule in training; a discriminator's first batch looks at values.
    generator, discriminator = task.generator.train(), task.critic.network.eval()
    num = max(config.painted_batch_size // training.accumulation, 1)
    with FakeTensorMode():
        players = [(network, _without_numbers(network)) for network in (generator, discriminator)]
        z = torch.zeros(num, generator.noise_dim)
        labels = torch.zeros(num, dtype=torch.int64) if names else None

        def forward() -> Tensor:
            images = functional_call(*players[0], (z, labels))
            logits: Tensor = functional_call(*players[1], (images, labels))
            return logits

        kept = {t.untyped_storage()._cdata for _, tensors in players for t in tensors.values()}
        activations = saved_bytes(forward, kept)
    state = state_bytes(generator, ema=training.ema_decay is not None) + state_bytes(discriminator)
    counts = [sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)]
    often = f"every {config.discriminator_steps} steps" if config.discriminator_steps > 1 else "every step"
    return {
        "parameters": f"{counts[0]:,} generator, {counts[1]:,} discriminator",
        "picture": f"{height}x{width} from {generator.noise_dim} random numbers",
        "classes": ", ".join(names) or "none",
        "batch": f"{training.batch_size} pictures a step in {training.accumulation} micro-batch(es); the "
        f"generator learns {often}, from {config.painted_batch_size}",
        "memory in fp32": f"about {format_bytes(state + activations)}: {format_bytes(state)} weights and "
        f"optimisers, {format_bytes(activations)} activations; about half of the latter in bf16",
    }


def _without_numbers(module: nn.Module) -> dict[str, Tensor]:
    """Tensors of the shapes of all its weights and buffers, for a forward in torch's FakeTensorMode."""
    state = [*module.named_parameters(), *module.named_buffers()]
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)
        for name, tensor in state
    }
