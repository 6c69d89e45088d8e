"""Find what is wrong with data before training does: what `taming data check` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from taming.config import build_config, parse_override, read_yaml, set_value
from taming.data.checking.findings import Finding, Progress
from taming.data.config import (
    DataConfig,
    FolderDataConfig,
    ScenesDataConfig,
    ShardsDataConfig,
)
from taming.errors import DataError


def check_data(
    config: DataConfig,
    *,
    workers: int | None = None,
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """Everything that is wrong with the files of a data set, both splits, in one pass.

    `decode` reads every file in full; else headers are read, and names, partners and sizes compared.
    `workers` threads work at once, by default one a core. Raises DataError where there is nothing to read.
    """
    match config:
        case FolderDataConfig():
            from taming.data.checking.folder import check_folder

            return check_folder(config, workers=workers, decode=decode, progress=progress)
        case ShardsDataConfig():
            from taming.data.checking.shards import check_shards

            return check_shards(config, workers=workers, decode=decode, progress=progress)
        case ScenesDataConfig():
            raise DataError("the built-in scenes are drawn, not read from files: there is nothing to check")


def check_source(
    source: str,
    overrides: Sequence[str] = (),
    *,
    workers: int | None = None,
    decode: bool = True,
    progress: Progress | None = None,
) -> Iterator[Finding]:
    """`check_data` of what a user means by DATA.

    A folder of pictures; shards, a folder of them with or without an index, an address, or one tar; a
    training config; a folder of codes. `overrides` are "key=value" of the data section. Raises UserError.
    """
    from taming.data.source import data_from, is_pack

    path = Path(source)
    codes = _folder_of_codes(path)
    if codes is not None:
        from taming.data.checking.codes import check_codes

        if overrides:
            raise DataError(f"{source} holds codes, which no option changes; leave out {overrides[0]}")
        return check_codes(codes, decode=decode, progress=progress)
    tars = _bare_tars(path)
    if not tars and not is_pack(source):
        data = data_from(source, size=1, overrides=overrides)
        return check_data(data, workers=workers, decode=decode, progress=progress)
    # Not through the index, which may be what is damaged. One pixel: nothing says how large pictures must be.
    values: dict[str, Any] = {"kind": "shards", "root": source, "size": 1}
    for override in overrides:
        key, value = parse_override(override)
        set_value(values, key.removeprefix("data."), value)
    config = build_config(ShardsDataConfig, values, source=source)
    if tars:
        from taming.data.checking.shards import check_tars

        return check_tars(tars, config, workers=workers, decode=decode, progress=progress)
    return check_data(config, workers=workers, decode=decode, progress=progress)


def _folder_of_codes(path: Path) -> Path | None:
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        section = read_yaml(path).get("data")
        if isinstance(section, dict) and section.get("kind") == "codes" and section.get("root"):
            return Path(str(section["root"])).expanduser()
        return None
    index = path / "index.json"
    if not index.is_file():
        return None
    with index.open("rb") as file:
        return path if b'"taming-codes/' in file.read(200) else None


def _bare_tars(path: Path) -> list[Path]:
    """Tars without an index that can be read as one of shards."""
    from taming.data.source import is_pack

    if path.is_file() and path.suffix == ".tar":
        return [path]
    return sorted(path.glob("*.tar")) if path.is_dir() and not is_pack(str(path)) else []
