"""Layouts of objects that a user gives as files to sample from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taming.data.annotations import read_json
from taming.errors import UserError


def read_layouts(paths: Sequence[Path]) -> list[list[dict[str, Any]]]:
    """One layout a file: {"objects": [{"label": "name or number", "box": [x0, y0, x1, y1]}, ...]}.

    Boxes are shares of the picture's width and height. What labels and boxes may be, the model's condition
    says. Raises UserError where a file is missing or of another form.
    """
    return [_read_layout(path) for path in paths]


def _read_layout(path: Path) -> list[dict[str, Any]]:
    document = read_json(path)
    objects = document.get("objects")
    if not isinstance(objects, list) or set(document) != {"objects"}:
        raise UserError(
            f'{path} is no layout; write {{"objects": [{{"label": "name", "box": [x0, y0, x1, y1]}}]}} with '
            "boxes in [0, 1]"
        )
    return objects
