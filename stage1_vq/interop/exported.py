"""What every export does: write a new folder, load what was written, compare on pictures, or take it back.

Axes: B pictures, C channels, H W pixels, h w cells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stage1_vq.model import VQModel
from stage1_vq.pictures import numbered_inputs
from taming.errors import ArtifactError, UserError
from taming.options import empty_folder

EQUAL_CODES = 0.999
"""Least share of codes that must be the same: two codes may be equally near to within rounding."""
PICTURE_DIFFERENCE = 1e-3
"""Largest difference of a value in pictures made of the same codes."""
SCENES_SIZE = (64, 96)


@dataclass(frozen=True)
class ExportReport:
    """How an exported model compares with ours."""

    format: str
    pictures: int
    cells: int
    codes_in_use: int
    """Different codes among the cells: one alone would prove nothing."""
    equal_codes: float | None
    """Share of cells in [0, 1] to which both give the same code; None where the export cannot encode."""
    picture_difference: float
    """Largest absolute difference of decoded values."""
    notes: tuple[str, ...] = ()

    def as_values(self) -> dict[str, Any]:
        """Plain values, for a table or json; without notes where there are none."""
        return {key: value for key, value in asdict(self).items() if value != ()}


def comparison_inputs(
    model: VQModel, pictures: str | None = None, size: tuple[int, int] | None = None, limit: int = 50
) -> list[Tensor]:
    """Inputs (1, C, H, W) to compare on: of a folder (or the scenes), at `size` or as trained.

    Raises UserError where there are none, or they do not suit the model.
    """
    factor = model.config.downsample_factor
    usual = SCENES_SIZE if pictures is None else (model.config.resolution,) * 2
    height, width = size or model.decoder.only_size or usual
    height, width = (max(factor, side // factor * factor) for side in (height, width))
    if size is not None and size != (height, width):
        raise UserError(
            f"--size {size[0]}x{size[1]} does not divide into cells of {factor}x{factor} pixels; "
            f"give {height}x{width}"
        )
    model.check_painted_size(height, width)
    if pictures is not None:
        inputs = numbered_inputs(pictures, (height, width), model.config)
    else:
        try:
            inputs = numbered_inputs("scenes", (height, width), model.config, [f"num_validation={limit}"])
        except UserError as error:
            raise UserError(
                f"the built-in scenes do not suit this tokenizer ({error}); give --pictures a folder of what "
                "it was trained on"
            ) from None
    found = [values[None] for _, _, values in islice(inputs, limit)]
    if not found:
        raise UserError(f"there are no pictures in {pictures}")
    return found


@torch.no_grad()
def compare(
    name: str,
    model: VQModel,
    inputs: Iterable[Tensor],
    encode: Callable[[Tensor], Tensor] | None,
    decode: Callable[[Tensor], Tensor],
    notes: tuple[str, ...] = (),
) -> ExportReport:
    """Codes of `encode` and pictures of `decode` against the model's, on inputs (B, C, H, W).

    Both decode the model's own codes, so that one code that differs does not count as a picture that does.
    """
    pictures = cells = equal = 0
    difference = torch.zeros(())
    used = torch.zeros(model.spec.codebook_size, dtype=torch.bool)
    for values in inputs:
        codes = model.encode(values)
        used[codes.flatten()] = True
        pictures, cells = pictures + len(codes), cells + codes.numel()
        if encode is not None:
            equal += int((encode(values) == codes).sum())
        # Unlike Python's max, this one lets no NaN through unseen.
        difference = torch.maximum(difference, (decode(codes) - model.decode(codes)).abs().max())
    share = None if encode is None else equal / cells
    return ExportReport(name, pictures, cells, int(used.sum()), share, float(difference), notes)


def check(report: ExportReport) -> None:
    """Raises ArtifactError where an export differs by more than rounding."""
    problems = []
    if report.equal_codes is not None and report.equal_codes < EQUAL_CODES:
        problems.append(f"only {report.equal_codes:.2%} of {report.cells} codes are the same")
    # Not (a <= b): NaN must fail as well.
    if not report.picture_difference <= PICTURE_DIFFERENCE:
        problems.append(f"pictures differ by {report.picture_difference:.2g}")
    if problems:
        raise ArtifactError(
            f"the {report.format} export does not compute what the model does: {' and '.join(problems)}; "
            "nothing was written"
        )


def write_description(
    path: Path, model: VQModel, report: ExportReport, facts: Mapping[str, Any] | None = None
) -> None:
    """A json that says what a program needs to know to use the export, and how it compared."""
    spec = model.spec
    document = {
        "input": model.config.input,
        "in_channels": spec.in_channels,
        "pixel_range": list(spec.pixel_range),
        "downsample_factor": spec.downsample_factor,
        "codebook_size": spec.codebook_size,
        "code_dim": spec.code_dim,
        "quantizer": model.config.quantizer.kind,
        "content_hash": model.content_hash(),
        **(facts or {}),
        "comparison": report.as_values(),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder for results, taken back where they fail. Raises UserError where it is not empty."""
    was_there = path.exists()
    empty_folder(path)
    try:
        yield path
    except BaseException:
        shutil.rmtree(path)
        if was_there:
            path.mkdir()
        raise


def optional(name: str) -> ModuleType:
    """Import a package that only some exports need. Raises UserError saying how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs {name} ({error}); install it with pip install 'taming-toolkit[interop]'"
        ) from None
