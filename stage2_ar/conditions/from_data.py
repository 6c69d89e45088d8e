"""What a condition learns before training: names, vocabularies, facts of a text encoder or a tokenizer.

It is written into the config, so that a saved model explains itself and sampling can speak in these words.
"""

from __future__ import annotations

from collections.abc import Callable

from stage2_ar.conditions.config import CodesConditionConfig, CombinedConditionConfig, SingleCondition
from stage2_ar.conditions.objects_config import ObjectsConditionConfig
from stage2_ar.conditions.text_config import TextConditionConfig, TransformersTextConfig, WordsConfig
from stage2_ar.conditions.tokenizers import with_facts
from stage2_ar.conditions.words import vocabulary_of
from stage2_ar.text_encoder import check_positions, open_encoder
from taming.data.dataset import PictureDataset

Condition = SingleCondition | CombinedConditionConfig


def fill_in(config: Condition, data: Callable[[], PictureDataset]) -> Condition:
    """The config with what the training data, or a text encoder, says; what is set stays as it is.

    `data` is only called where it is asked. Raises UserError where an encoder or tokenizer cannot be opened.
    """
    if isinstance(config, CombinedConditionConfig):
        parts = [_fill_in(part, data) for part in config.conditions]
        return config.model_copy(update={"conditions": parts})
    return _fill_in(config, data)


def _fill_in(config: SingleCondition, data: Callable[[], PictureDataset]) -> SingleCondition:
    match config:
        case CodesConditionConfig():
            return with_facts(config)
        case ObjectsConditionConfig(names=()):
            # More names than classes are refused by the check of the data, with the way out.
            names = tuple(data().object_names)[: config.num_classes]
            return ObjectsConditionConfig.model_validate({**config.model_dump(), "names": names})
        case TextConditionConfig(encoder=WordsConfig(vocabulary=()) as words):
            vocabulary = vocabulary_of(data().texts())
            return config.model_copy(update={"encoder": words.model_copy(update={"vocabulary": vocabulary})})
        case TextConditionConfig(encoder=TransformersTextConfig() as encoder):
            if encoder.hidden_size is not None and encoder.weights_hash is not None:
                return config  # that it is still the same encoder is checked when it is used
            opened = open_encoder(encoder.name)
            check_positions(opened, encoder.max_length)
            facts = {"hidden_size": opened.hidden_size, "weights_hash": opened.content_hash}
            return config.model_copy(update={"encoder": encoder.model_copy(update=facts)})
        case _:
            return config
