"""A discriminator on disk: a folder beside the model that it judged, for fine-tuning."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from taming.artifact import load_artifact, load_state, save_artifact
from taming.config import Config, build_config
from taming.errors import ArtifactError
from taming.gan.discriminators import DiscriminatorConfig

ARTIFACT_KIND, FOLDER = "discriminator", "discriminator"
"""What config.json calls a saved discriminator, and its folder beside the model that it judged."""


class _Saved(Config):
    network: DiscriminatorConfig


def save_discriminator(folder: Path, config: DiscriminatorConfig, network: nn.Module) -> None:
    """Write config.json and model.safetensors into folder/discriminator."""
    save_artifact(folder / FOLDER, ARTIFACT_KIND, config, network.state_dict())


def load_discriminator(source: str | Path, network: nn.Module, config: DiscriminatorConfig) -> str | None:
    """Load the discriminator saved beside the model `source` into `network`, which is of `config`.

    Returns why it stays as it is: none was saved, or one of another config or for pictures of another size;
    None where it was loaded.
    Raises ArtifactError where one is there and damaged.
    """
    folder = Path(source)
    if folder.is_dir():
        if not any((place / FOLDER).is_dir() for place in (folder, folder / "model")):
            return f"{source} holds no discriminator"
        values, state = load_artifact(source, ARTIFACT_KIND, subfolder=FOLDER)
    else:
        try:
            values, state = load_artifact(source, ARTIFACT_KIND, subfolder=FOLDER)
        except ArtifactError as error:  # the model was to be had from there, a moment ago
            return f"no discriminator was found with the model: {error}"
    saved = build_config(_Saved, {"network": values}, source=f"discriminator of {source}").network
    if saved != config:
        return f"the discriminator of {source} is of another config ({saved})"
    own = network.state_dict()
    if own.keys() == state.keys() and any(own[key].shape != state[key].shape for key in own):
        return f"the discriminator of {source} was built for pictures of another size"
    load_state(network, state, source=f"{source}/{FOLDER}")
    return None
