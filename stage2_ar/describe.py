"""What a config of stage two amounts to, said before a training: sizes, memory, and how is trained."""

from __future__ import annotations

import torch

from stage2_ar.codes import CodeDataset
from stage2_ar.config import ARModelConfig, ARTrainConfig, CodesDataConfig
from stage2_ar.fine_tuning import hold_transformer
from stage2_ar.model import ARModel
from stage2_ar.optimizers import hidden_matrices
from stage2_ar.task import model_config
from stage2_ar.train import check_options, filled_in, load_tokenizer
from stage2_ar.transformer import next_code_loss
from taming.training.memory import parameter_storages, saved_bytes, state_bytes
from taming.units import format_bytes


def describe(config: ARTrainConfig) -> dict[str, str]:
    """What a config amounts to: sizes, parameters, memory. Pictures are opened for their words alone."""
    tokenizer = load_tokenizer(config)
    config = filled_in(config)
    if isinstance(config.data, CodesDataConfig):
        size = CodeDataset(config.data.root, "train").size
    else:
        size = config.data.height_width
    values, training = model_config(config, tokenizer, size), config.training
    check_options(config, values)
    height, width = values.grid
    with torch.device("meta"):
        model = ARModel(values)
    prefix = model.condition.prefix_length(values.grid)
    if config.train_only == "condition":
        hold_transformer(model)
    state = state_bytes(model, ema=training.ema_decay is not None)
    if config.optimizer.method == "muon":  # one moment a weight, not two
        state -= 4 * sum(weight.numel() for weight in hidden_matrices(model).values())
    # Layers are alike: one and two of them, for one picture, tell what all keep.
    one, two = (_saved_by(values, layers) for layers in (1, 2))
    num_layers, micro_batch = (
        values.transformer.num_layers,
        max(training.batch_size // training.accumulation, 1),
    )
    activations = whole = micro_batch * (one + (num_layers - 1) * (two - one))
    if config.recompute:  # each block's input, and one block whole at a time
        one_kept, two_kept = (_saved_by(values, layers, recompute=True) for layers in (1, 2))
        activations = micro_batch * (one_kept + (num_layers - 1) * (two_kept - one_kept) + two - one)
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "picture": f"{size[0]}x{size[1]}",
        "latent grid": f"{height}x{width} (f{values.downsample_factor})",
        "sequence length": f"{prefix + height * width - 1}: {prefix} of the condition, {height * width} "
        f"codes of {values.vocabulary_size}",
        "batch": f"{training.batch_size} pictures a step in {training.accumulation} micro-batch(es)",
        "memory in fp32": f"about {format_bytes(state + activations)}: {format_bytes(state)} weights and "
        f"optimiser, {format_bytes(activations)} activations; about half of the latter in bf16",
    }
    return facts | _describe_options(config, whole, activations)


def _describe_options(config: ARTrainConfig, whole: int, kept: int) -> dict[str, str]:
    """The lines of a dry run that tell how, and from where, is trained; bytes of activations."""
    optimizer, order = config.optimizer, config.random_order
    facts = {"optimiser": f"AdamW at {optimizer.learning_rate:g}"}
    if optimizer.method == "muon":
        facts["optimiser"] = (
            f"Muon for the blocks' matrices, AdamW for the rest, at {optimizer.learning_rate:g}"
        )
    if config.init_from is not None:
        what = "the condition alone" if config.train_only == "condition" else "everything"
        facts["start"] = f"{config.init_from}; {what} is trained"
    if order is not None:
        end = 1.0 if order.end is None else order.end
        facts["random orders"] = (
            f"of all samples up to {order.start:.0%} of the steps, then fewer, "
            f"of {order.final_share:.0%} from {end:.0%} on"
        )
    if config.pkeep < 1:
        facts["input codes"] = f"{1 - config.pkeep:.0%} replaced by random ones"
    if config.label_smoothing:
        facts["label smoothing"] = f"{config.label_smoothing:g}"
    if config.recompute:
        facts["recompute"] = f"on: {format_bytes(kept)} activations in place of {format_bytes(whole)}"
    if config.compile:
        facts["compile"] = "the blocks, at the first step"
    facts["evaluation"] = "held-out pictures"
    if config.memorisation is not None:
        facts["evaluation"] += (
            f", and as many training ones: warns where these cost {config.memorisation.gap:.0%} fewer bits"
        )
    facts["saved model"] = {
        "last": "of the last step",
        "best": "of the evaluation with the lowest held-out loss",
    }[config.keep]
    return facts


def _saved_by(values: ARModelConfig, layers: int, *, recompute: bool = False) -> int:
    """Bytes that a model of so many layers keeps for the backward pass of one picture."""
    transformer = values.transformer.model_copy(update={"num_layers": layers})
    model = ARModel(values.model_copy(update={"transformer": transformer}))
    model.transformer.recompute = recompute
    batch = model.condition.example(1, values.grid)
    codes = torch.zeros(1, *values.grid, dtype=torch.int64)
    return saved_bytes(
        lambda: next_code_loss(model(codes, batch), codes.flatten(1)), parameter_storages(model)
    )
