"""Find what is wrong with data before training does: what `taming data check` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from taming.config import read_yaml
from taming.data.config import FolderDataConfig, ScenesDataConfig
from taming.data.findings import Finding, Progress
from taming.errors import DataError


def check_data(
    config: FolderDataConfig | ScenesDataConfig,
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
            from taming.data.check_folder import check_folder

            return check_folder(config, workers=workers, decode=decode, progress=progress)
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
    """`check_data` of what a user means by DATA: a folder, a training config, or a folder of codes.

    `overrides` are "key=value" of the data section. Raises UserError.
    """
    from taming.data.source import data_from

    codes = _folder_of_codes(Path(source))
    if codes is not None:
        from taming.data.check_codes import check_codes

        if overrides:
            raise DataError(
                f"{source} holds codes, which no option of data changes; leave out {overrides[0]}"
            )
        return check_codes(codes, decode=decode, progress=progress)
    # One pixel: without a config nothing says how large pictures must be.
    config = data_from(source, size=1, overrides=overrides)
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
