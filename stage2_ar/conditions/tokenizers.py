"""The tokenizers that conditions bring along: named in a config, attached to the model, saved beside it."""

from __future__ import annotations

from collections.abc import Callable

from stage1_vq import VQModel
from stage2_ar.conditions.base import Condition
from stage2_ar.conditions.codes import CodesCondition
from stage2_ar.conditions.config import (
    CodesConditionConfig,
    CombinedConditionConfig,
    ConditionTokenizerConfig,
    SingleCondition,
)
from taming.errors import ConfigError

AnyCondition = SingleCondition | CombinedConditionConfig

FOLDER = "condition_tokenizer"


def facts_of(tokenizer: VQModel) -> ConditionTokenizerConfig:
    """What a condition keeps of its tokenizer."""
    spec = tokenizer.spec
    return ConditionTokenizerConfig(
        input=tokenizer.config.input,
        channels=spec.in_channels,
        codebook_size=spec.codebook_size,
        downsample_factor=spec.downsample_factor,
        tokenizer_hash=tokenizer.codes_hash(),
    )


def with_facts(config: CodesConditionConfig) -> CodesConditionConfig:
    """A training's condition with the facts of the tokenizer that it names.

    Raises ConfigError where it names none, ArtifactError where it cannot be loaded.
    """
    facts = facts_of(_named(config))
    if config.facts is not None and config.facts != facts:
        raise ConfigError(
            f"condition.facts are of the tokenizer {config.facts.tokenizer_hash[:12]}, and "
            f"{config.tokenizer} is {facts.tokenizer_hash[:12]}; leave condition.facts out"
        )
    return config.model_copy(update={"facts": facts})


def without_paths(config: AnyCondition) -> AnyCondition:
    """The condition as a model keeps it: where tokenizers lay in training is nobody's business later."""
    if isinstance(config, CombinedConditionConfig):
        return config.model_copy(update={"conditions": [without_paths(part) for part in config.conditions]})
    if isinstance(config, CodesConditionConfig):
        return config.model_copy(update={"tokenizer": None})
    return config


def parts_with_tokenizer(condition: Condition) -> dict[str, CodesCondition]:
    """The parts of a condition that have a tokenizer of their own, by the folder that it is saved in.

    One alone is in condition_tokenizer/, several are in condition_tokenizer_NAME/, NAME being the user's.
    """
    parts = [module for module in condition.modules() if isinstance(module, CodesCondition)]
    if len(parts) == 1:
        return {FOLDER: parts[0]}
    return {f"{FOLDER}_{part.name}": part for part in parts}


def attach_named(condition: Condition, config: AnyCondition) -> None:
    """Give a condition the tokenizers that its training's config names. Raises ArtifactError."""
    configs = config.conditions if isinstance(config, CombinedConditionConfig) else [config]
    named = [part for part in configs if isinstance(part, CodesConditionConfig)]
    for part, own in zip(parts_with_tokenizer(condition).values(), named, strict=True):
        part.attach_tokenizer(_named(own))


def attach_tokenizers(condition: Condition, load: Callable[[str], VQModel]) -> None:
    """Give each part its tokenizer, which `load` finds by the folder's name. Raises ArtifactError."""
    for folder, part in parts_with_tokenizer(condition).items():
        part.attach_tokenizer(load(folder))


def _named(config: CodesConditionConfig) -> VQModel:
    if config.tokenizer is None:
        raise ConfigError(
            "condition.kind=codes needs the tokenizer of the condition; set condition.tokenizer to a saved "
            "one, made with `taming vq train`"
        )
    return VQModel.from_pretrained(config.tokenizer)
