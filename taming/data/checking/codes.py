"""What is wrong with a folder of codes, as far as its index and its tensors say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from taming.data.checking.findings import Finding, Findings, Progress
from taming.errors import BadSample, DataError

INDEX, FORMAT = "index.json", "taming-codes/1"
# How safetensors says that there is less than there should be.
_CUT_OFF = ("not fully covered", "invalid header length", "header too small")


def check_codes(folder: Path, *, decode: bool = True, progress: Progress | None = None) -> Iterator[Finding]:
    """Shards that are gone, cut off, or not what the index says; with `decode`, codes outside the codebook.

    Raises DataError where `folder` holds no index that can be read.
    """
    index = read_code_index(folder)
    shards = [(split, entry) for split, entries in index["splits"].items() for entry in entries]
    seen: dict[tuple[str, str], Path] = {}
    for number, (split, entry) in enumerate(shards, start=1):
        findings = Findings()
        path = folder / entry["file"]
        with findings.catch(path):
            _check_shard(path, folder, entry, index["codebook_size"], decode)
        for key in entry["keys"]:
            other = seen.setdefault((split, key), path)
            if other is not path or entry["keys"].count(key) > 1:
                detail = (
                    f"{path}: the sample {key!r} of {split} is there twice (also in {other}); encode again"
                )
                findings.add(path, "duplicate", detail, () if other is path else (other,))
                break  # one is enough to say of a shard
        yield from findings.found
        if progress is not None:
            progress(number, len(shards))


def read_code_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of codes, its shape checked. Raises DataError."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); encode again with `taming vq encode`") from None
    whole = (
        isinstance(index, dict)
        and index.get("format") == FORMAT
        and isinstance(index.get("codebook_size"), int)
        and isinstance(index.get("splits"), dict)
        and all(isinstance(entries, list) for entries in index["splits"].values())
    )
    if not whole or not all(_is_entry(e) for entries in index["splits"].values() for e in entries):
        raise DataError(f"{path} is no index of {FORMAT}; encode again with `taming vq encode`")
    return index


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("file"), str)
        and isinstance(entry.get("keys"), list)
        and all(isinstance(key, str) for key in entry["keys"])
        and isinstance(entry.get("size", 0), int)
        and all(isinstance(entry.get(name, []), list) for name in ("text", "objects"))
    )


def _check_shard(path: Path, folder: Path, entry: dict[str, Any], codebook_size: int, decode: bool) -> None:
    """Raises BadSample."""
    if Path(entry["file"]).name != entry["file"]:
        raise BadSample(f"{folder / INDEX} names {entry['file']!r}, outside of its folder", "mismatched")
    if not path.is_file():
        raise BadSample(f"{path} is in the index and not in the folder; encode again", "missing")
    size = path.stat().st_size
    if entry.get("size", size) != size:
        reason = "truncated" if size < entry["size"] else "mismatched"
        raise BadSample(
            f"{path} has {size} bytes, not the {entry['size']} of the index; encode again", reason
        )
    with path.open("rb") as file:
        if "sha256" in entry and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise BadSample(f"{path} holds other bytes than the index says; encode again", "checksum")
    count = len(entry["keys"])
    try:
        with safe_open(path, framework="np") as shard:
            lengths = {name: shard.get_slice(name).get_shape()[:1] for name in shard.keys()}  # noqa: SIM118
            codes = shard.get_tensor("codes") if decode and "codes" in lengths else None
    except (OSError, SafetensorError) as error:
        reason = "truncated" if any(word in str(error) for word in _CUT_OFF) else "unreadable"
        raise BadSample(f"{path} cannot be read: {error}; encode again", reason) from None
    told = {name: [len(entry[name])] for name in ("text", "objects") if isinstance(entry.get(name), list)}
    wrong = [name for name, length in {**lengths, **told}.items() if length != [count]]
    if "codes" not in lengths or wrong:
        what = f"{wrong[0]} of another number of samples" if wrong else "no codes"
        raise BadSample(f"{path} holds {what} than the {count} of the index; encode again", "mismatched")
    if codes is not None and codes.size and (codes.min() < 0 or codes.max() >= codebook_size):
        raise BadSample(
            f"{path} holds codes from {codes.min()} to {codes.max()}, outside of [0, {codebook_size});"
            " encode again",
            "mismatched",
        )
