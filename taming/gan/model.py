"""A generator that can be saved, loaded and sampled from."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from taming.artifact import content_hash, load_artifact, push_artifact, save_artifact
from taming.building import build_with
from taming.config import Config, build_config
from taming.errors import UserError
from taming.gan.generators import GeneratorConfig, build_generator
from taming.gan.sample import (
    Classes,
    Progress,
    choose_classes,
    class_number,
    paint,
    paint_between,
    sample_noise,
    slerp,
)

ARTIFACT_KIND = "gan"
Side = Annotated[int, Field(gt=0)]


class GANModelConfig(Config):
    """A generator, and of what it paints pictures."""

    generator: GeneratorConfig
    size: tuple[Side, Side]
    """(H, W) pixels."""
    channels: int = Field(3, ge=1)
    num_classes: int | None = Field(None, ge=1)
    """null: it knows no classes."""
    class_names: tuple[str, ...] = ()
    """One for each class, in the order of their numbers; or none."""

    @model_validator(mode="after")
    def _check(self) -> GANModelConfig:
        if self.class_names and len(self.class_names) != (self.num_classes or 0):
            raise ValueError(
                f"{len(self.class_names)} class_names for {self.num_classes or 0} classes; name each, or none"
            )
        if (reason := self.generator.unsuited(*self.size)) is not None:
            raise ValueError(reason)
        return self


class GANModel(nn.Module):
    """Noise and classes to pictures (N, C, H, W) in [-1, 1]: SAGAN, TransGAN, ViTGAN or STransGAN."""

    def __init__(self, config: GANModelConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = build_generator(
            config.generator, size=config.size, channels=config.channels, num_classes=config.num_classes
        )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Noise (B, Z) and classes (B,) int64 -> pictures (B, C, H, W), not clamped; in the current mode."""
        images: Tensor = self.generator(z, y)
        return images

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        classes: Classes | None = None,
        truncation: float | None = None,
        first: int = 0,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Tensor:
        """`num` pictures (N, C, H, W) in [-1, 1] on the CPU, painted in eval mode.

        Picture i is a function of (seed, first + i) and its class: of no batch and no other picture.
        `classes` are numbers or names, one for all or one for each; without any, picture i is of class
        (first + i) mod the number of classes. `truncation` in (0, inf): see `sample_noise`.
        Raises UserError.
        """
        if classes is None and self.config.num_classes is not None:
            classes = [(first + i) % self.config.num_classes for i in range(num)]
        y = self.class_numbers(num, classes)
        z = sample_noise(num, self.generator.noise_dim, seed=seed, first=first, truncation=truncation)
        return paint(self.generator, z, y, batch_size=batch_size, progress=progress)

    def interpolate(
        self,
        frames: int,
        *,
        seed: int = 0,
        places: tuple[int, int] = (0, 1),
        classes: int | str | tuple[int | str, int | str] | None = None,
        truncation: float | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Tensor:
        """`frames` pictures (N, C, H, W) in [-1, 1] on the way from one picture of `seed` to another.

        `places` are their numbers i in `sample`; between their noises the way is an arc (`slerp`), and equal
        numbers leave the noise as it is. `classes` is one class for the whole way, or that of its start and
        that of its end. Raises UserError.
        """
        if frames < 2:
            raise UserError(f"{frames} frames make no way between two pictures; ask for 2 or more")
        ends = classes if isinstance(classes, tuple) else (classes, classes)
        if None in ends and self.config.num_classes is not None:
            raise UserError("say of which class the pictures shall be, or between which two")
        start, end = (self.class_numbers(frames, name) for name in ends)
        dim, shares = self.generator.noise_dim, torch.linspace(0, 1, frames)
        noises = [sample_noise(1, dim, seed=seed, first=place, truncation=truncation)[0] for place in places]
        z = noises[0].expand(frames, dim) if places[0] == places[1] else slerp(noises[0], noises[1], shares)
        return paint_between(self.generator, z, start, end, shares, batch_size=batch_size, progress=progress)

    def class_numbers(self, num: int, classes: Classes | None) -> Tensor | None:
        """(num,) int64 of what `sample` takes as classes; None for a model without any. Raises UserError."""
        config = self.config
        return choose_classes(num, classes, num_classes=config.num_classes, names=config.class_names)

    def class_number(self, asked: int | str) -> int:
        """The number of a class given by name or number. Raises UserError."""
        if self.config.num_classes is None:
            raise UserError("this model was trained without classes; leave the class out")
        return class_number(asked, num_classes=self.config.num_classes, names=self.config.class_names)

    def class_name(self, number: int) -> str:
        """What to call a class: its name, or its number where it has none."""
        names = self.config.class_names
        return names[number] if names else f"class {number}"

    def content_hash(self) -> str:
        """sha256 of all weights: the same on every machine, another after any change."""
        return content_hash(self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path) -> GANModel:
        """Load a saved folder, the model of a run, or a hub id "owner/name"; in eval mode, on the CPU.

        Raises ArtifactError where there is none, or it is not a generator of this toolkit.
        """
        values, state = load_artifact(source, ARTIFACT_KIND)
        config = build_config(GANModelConfig, values, source=f"config of {source}")
        return build_with(lambda: cls(config), state, source=source)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        facts: dict[str, Any] = {
            "noise_dim": self.generator.noise_dim,
            "size": list(self.config.size),
            "channels": self.config.channels,
            "pixel_range": [-1.0, 1.0],
        }
        save_artifact(folder, ARTIFACT_KIND, self.config, self.state_dict(), facts=facts)

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload to the hub as "owner/name"; returns the commit's address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_artifact(folder, repo_id, private=private)
