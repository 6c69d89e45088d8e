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


def resolved(
    config: SingleCondition | CombinedConditionConfig,
) -> tuple[SingleCondition | CombinedConditionConfig, list[VQModel]]:
    """A training's condition with the facts of the tokenizers that it names, and these, part by part.

    Raises ConfigError where codes have no tokenizer, ArtifactError where it cannot be loaded.
    """
    if isinstance(config, CombinedConditionConfig):
        parts = [resolved(part) for part in config.conditions]
        conditions = [part for part, _ in parts]
        return config.model_copy(update={"conditions": conditions}), [t for _, found in parts for t in found]
    if not isinstance(config, CodesConditionConfig):
        return config, []
    if config.tokenizer is None:
        raise ConfigError(
            "condition.kind=codes needs the tokenizer of the condition; set "
            "condition.tokenizer to a saved one, made with `taming vq train`"
        )
    tokenizer = VQModel.from_pretrained(config.tokenizer)
    facts = facts_of(tokenizer)
    if config.facts is not None and not tokenizer.makes_codes_of(config.facts.tokenizer_hash):
        raise ConfigError(
            f"condition.facts are of the tokenizer {config.facts.tokenizer_hash[:12]}, and "
            f"{config.tokenizer} is {facts.tokenizer_hash[:12]}; leave condition.facts out"
        )
    # Where it lay on the machine of the training is nobody's business later.
    return config.model_copy(update={"tokenizer": None, "facts": facts}), [tokenizer]


def parts_with_tokenizer(condition: Condition) -> dict[str, CodesCondition]:
    """The parts of a condition that have a tokenizer of their own, by the folder that it is saved in.

    One alone is in condition_tokenizer/, several are in condition_tokenizer_NAME/, NAME being the user's.
    """
    parts = [module for module in condition.modules() if isinstance(module, CodesCondition)]
    if len(parts) == 1:
        return {FOLDER: parts[0]}
    return {f"{FOLDER}_{part.name}": part for part in parts}


def attach_named(condition: Condition, config: SingleCondition | CombinedConditionConfig) -> None:
    """Give a condition the tokenizers that its training's config names. Raises as `resolved`."""
    for part, tokenizer in zip(parts_with_tokenizer(condition).values(), resolved(config)[1], strict=True):
        part.attach_tokenizer(tokenizer)


def attach_tokenizers(condition: Condition, load: Callable[[str], VQModel]) -> None:
    """Give each part its tokenizer, which `load` finds by the folder's name. Raises ArtifactError."""
    for folder, part in parts_with_tokenizer(condition).items():
        part.attach_tokenizer(load(folder))
