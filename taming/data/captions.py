"""Captions of pictures: a text file beside each picture, or a JSON in the layout of COCO's captions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from taming.data.annotations import entries_of, match_pictures, read_json
from taming.errors import DataError


def read_captions(source: Path, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Key of each picture -> its captions, at least one.

    `source` is a folder with KEY.txt for each picture, one caption a line, or a .json with COCO's lists
    `images` and `annotations` ({"image_id", "caption"}). Blank lines are left out.
    Raises DataError where it is missing or malformed, or a picture has no caption.
    """
    if source.is_dir():
        captions = {key: _read_lines(source / f"{key}.txt") for key in keys}
    elif source.is_file() and source.suffix.lower() == ".json":
        captions = _read_coco(source, keys)
    else:
        raise DataError(
            f"data.text: {source} is neither a folder of .txt files nor a .json file of captions; check the "
            "path"
        )
    bare = sorted(key for key, lines in captions.items() if not lines)
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise DataError(
            f"picture {bare[0]} has no caption in {source}{more}; write one, remove the picture, or unset "
            "data.text"
        )
    return captions


def _read_lines(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"captions {path} cannot be read as UTF-8: {error}; save the file again") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _read_coco(path: Path, keys: Collection[str]) -> dict[str, tuple[str, ...]]:
    document = read_json(path)
    found, _ = match_pictures(document, path, keys)
    captions: dict[str, list[str]] = {key: [] for key, _ in found.values()}
    for number, entry in enumerate(entries_of(document, "annotations", path, {"image_id": int})):
        caption = entry.get("caption")
        if not isinstance(caption, str):
            raise DataError(
                f"{path}: annotation {number} has no caption; give COCO's captions file, not its instances"
            )
        # A caption on several lines is one caption.
        words = " ".join(caption.split())
        if entry["image_id"] in found and words:
            captions[found[entry["image_id"]][0]].append(words)
    return {key: tuple(lines) for key, lines in captions.items()}
