"""What a user gives to `taming ar sample` as files and words, read into a pipeline's conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stage2_ar.model import ARModel
from stage2_ar.sample_command.given import read_given
from stage2_ar.sample_command.layout_files import read_layouts
from taming.errors import UserError


@dataclass(frozen=True)
class ConditionFiles:
    """The options of the command that say what to paint: one field an option, empty where it is not given."""

    classes: list[int] = field(default_factory=list)
    segmentation: list[Path] = field(default_factory=list)
    depth: list[Path] = field(default_factory=list)
    image: list[Path] = field(default_factory=list)
    objects: list[Path] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


@dataclass
class GivenConditions:
    """Conditions for `ARPipeline`, and how they are written down beside each picture."""

    values: dict[str, Any] = field(default_factory=dict)
    """User's name of a condition -> its value for all rows."""
    said: dict[str, list[Any]] = field(default_factory=dict)
    """The same in words that JSON holds: one entry a row."""
    size: tuple[int, int] | None = None
    """(H, W) pixels that were asked for, or that the maps have."""

    @property
    def rows(self) -> int:
        """How many conditions there are; 1 where the model needs none."""
        return max((len(entries) for entries in self.said.values()), default=1)

    def of_row(self, row: int) -> dict[str, Any]:
        """What was said about the pictures of one row."""
        return {name: entries[row % len(entries)] for name, entries in self.said.items()}


def read_conditions(files: ConditionFiles, model: ARModel, size: tuple[int, int] | None) -> GivenConditions:
    """Read what was given, at `size` pixels where it is not None.

    Raises UserError for files that cannot be read, and for options of unequal counts (each counts the
    rows; one that is given once holds for all).
    """
    given = GivenConditions(size=size)
    if files.classes:
        given.values["class"] = torch.tensor(files.classes)
        given.said["class"] = list(files.classes)
    if files.objects:
        given.values["objects"] = read_layouts(files.objects)
        given.said["objects"] = list(given.values["objects"])
    if files.text:
        given.values["text"] = list(files.text)
        given.said["text"] = list(files.text)
    pictures = {"segmentation": files.segmentation, "depth": files.depth, "image": files.image}
    pictures = {name: paths for name, paths in pictures.items() if paths}
    read, given.size = read_given(model.condition, pictures, given.size, model.config.downsample_factor)
    given.values |= read
    given.said |= {name: [str(path) for path in paths] for name, paths in pictures.items()}
    _repeat_single(given)
    return given


def _repeat_single(given: GivenConditions) -> None:
    """Conditions that were given once hold for every row of the others."""
    counts = {name: len(entries) for name, entries in given.said.items()}
    rows = given.rows
    wrong = [f"{name} {count} times" for name, count in counts.items() if count not in (1, rows)]
    if wrong:
        raise UserError(
            f"conditions were given in unequal numbers ({', '.join(wrong)}, others {rows}); give each once, "
            "or as often as the others"
        )
    for name, count in counts.items():
        if count < rows:
            value = given.values[name]
            repeated = value * rows if isinstance(value, list) else value.expand(rows, *value.shape[1:])
            given.values[name] = repeated
