"""PNG's own checksums, which decoders pass over where the picture's data can be unpacked all the same."""

from __future__ import annotations

import zlib
from typing import BinaryIO, Literal

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIECE = 1 << 20


def png_fault(file: BinaryIO) -> Literal["truncated", "checksum"] | None:
    """What is wrong with the chunks of a PNG (W3C PNG, section 5); None for a whole one, or another format.

    Reads from the file's start, a MiB at a time.
    """
    file.seek(0)
    if file.read(8) != _SIGNATURE:
        return None
    while True:
        head = file.read(8)
        left, kind = int.from_bytes(head[:4], "big"), head[4:]
        total = zlib.crc32(kind)
        while left and (piece := file.read(min(left, _PIECE))):
            total = zlib.crc32(piece, total)
            left -= len(piece)
        stored = file.read(4)
        if left or len(stored) < 4:
            return "truncated"
        if int.from_bytes(stored, "big") != total:
            return "checksum"
        if kind == b"IEND":
            return None
