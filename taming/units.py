"""Amounts of bytes as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str | int) -> int:
    """256M, 1.5G, 64GiB or 1000 -> bytes; K, M, G and T are powers of 1024. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", str(text).strip().upper())
    if found is None or not (count := int(float(found[1]) * _UNITS[found[2]])):
        raise ValueError(f"{text!r} is no size; write a number of bytes, or 256M, or 1.5G")
    return count


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
