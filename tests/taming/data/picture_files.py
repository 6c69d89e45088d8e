"""Picture files written byte by byte from their specifications, so that tests owe nothing to our reader.

PNG: W3C Portable Network Graphics (Third Edition). TIFF: Adobe TIFF 6.0. BMP: Microsoft's BITMAPINFOHEADER
and BITMAPV4HEADER. GIF: CompuServe GIF89a. Netpbm: its manual pages.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, step across, step down of each pass."""


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    pixels: np.ndarray,
    colour_type: int,
    *,
    bits: int = 8,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
    size: tuple[int, int] | None = None,
) -> bytes:
    """A PNG of `pixels` (H, W) or (H, W, C), unfiltered; `before` are chunks before the picture's data.

    `size` (H, W) is what the header claims, where that is another than the truth.
    """
    height, width = size or pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, int(interlaced))
    passes = [pixels[y::down, x::across] for x, y, across, down in _ADAM7] if interlaced else [pixels]
    rows = [b"\0" + _png_row(row, bits) for part in passes if part.size for row in part]
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in chunks)


def _png_row(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    if bits == 8:
        return row.astype(np.uint8).tobytes()
    digits = (row[:, None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1)).tobytes()


def tiff(
    strips: Sequence[bytes],
    width: int,
    height: int,
    *,
    order: str = "<",
    bits: Sequence[int] = (8, 8, 8),
    photometric: int = 2,
    tags: Mapping[int, tuple[str, Sequence[int]]] = {},
    tile: tuple[int, int] | None = None,
) -> bytes:
    """A TIFF of one page; `order` is "<" (II) or ">" (MM), `tags` are more: number -> (H or L, values)."""
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", bits),
        259: ("H", [1]),
        262: ("H", [photometric]),
        277: ("H", [len(bits)]),
    }
    offsets, place = [], 8
    for strip in strips:
        offsets.append(place)
        place += len(strip) + len(strip) % 2
    where, lengths = (273, 279) if tile is None else (324, 325)
    entries[where], entries[lengths] = ("L", offsets), ("L", [len(strip) for strip in strips])
    if tile is None:
        entries[278] = ("L", [-(-height // len(strips))])
    else:
        entries[322], entries[323] = ("L", [tile[1]]), ("L", [tile[0]])
    entries.update(tags)
    body = b"".join(strip + b"\0" * (len(strip) % 2) for strip in strips)
    table, more = b"", b""
    start = place + 2 + 12 * len(entries) + 4
    for number, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        table += struct.pack(f"{order}HHL", number, {"H": 3, "L": 4}[kind], len(values))
        if len(packed) > 4:
            table += struct.pack(f"{order}L", start + len(more))
            more += packed + b"\0" * (len(packed) % 2)
        else:
            table += packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HL", 42, place)
    return head + body + struct.pack(f"{order}H", len(entries)) + table + b"\0\0\0\0" + more


def bmp(
    width: int,
    height: int,
    bits: int,
    body: bytes,
    *,
    compression: int = 0,
    palette: Sequence[tuple[int, int, int]] = (),
    masks: Sequence[int] = (),
) -> bytes:
    """A BMP; a negative `height` has its first row first. `masks` (R, G, B, A) make it a BITMAPV4HEADER."""
    colours = b"".join(bytes((blue, green, red, 0)) for red, green, blue in palette)
    fields = (width, height, 1, bits, compression, len(body), 2835, 2835, len(palette), 0)
    header = struct.pack("<iiHHIIiiII", *fields)
    if masks:
        header += struct.pack("<4I", *masks) + b"BGRs" + b"\0" * 48
    header = struct.pack("<I", 4 + len(header)) + header
    start = 14 + len(header) + len(colours)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + header + colours + body


def gif(
    width: int,
    height: int,
    palette: Sequence[tuple[int, int, int]],
    frames: Sequence[tuple[int, int, np.ndarray]],
    *,
    transparent: int | None = None,
    background: int = 0,
) -> bytes:
    """A GIF of frames (left, top, indices (h, w)), with 8 colours at most."""
    colours = b"".join(bytes(colour) for colour in [*palette, *[(0, 0, 0)] * (8 - len(palette))])
    out = b"GIF89a" + struct.pack("<HHBBB", width, height, 0b1111_0010, background, 0) + colours
    for left, top, indices in frames:
        flags = 0 if transparent is None else 1
        out += b"\x21\xf9\x04" + struct.pack("<BHB", flags, 10, transparent or 0) + b"\0"
        rows, columns = indices.shape
        out += b"\x2c" + struct.pack("<HHHHB", left, top, columns, rows, 0) + b"\x03"
        out += _gif_blocks(_uncompressed_lzw(indices.reshape(-1).tolist()))
    return out + b"\x3b"


def _uncompressed_lzw(indices: Sequence[int]) -> bytes:
    """Codes of four bits: a clear code before the table would grow to five."""
    codes: list[int] = []
    for number, index in enumerate(indices):
        if number % 6 == 0:
            codes.append(8)  # clear
        codes.append(index)
    codes.append(9)  # end
    total = sum(code << 4 * place for place, code in enumerate(codes))
    return total.to_bytes((4 * len(codes) + 7) // 8, "little")


def _gif_blocks(data: bytes) -> bytes:
    parts = [data[first : first + 255] for first in range(0, len(data), 255)]
    return b"".join(bytes((len(part),)) + part for part in parts) + b"\0"


def without_segment(jpeg: bytes, marker: int) -> bytes:
    """A JPEG without its segments of one kind (0xEE: Adobe's)."""
    out, place = jpeg[:2], 2
    while jpeg[place + 1] != 0xDA:  # start of scan: what follows is no segment
        length = 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
        if jpeg[place + 1] != marker:
            out += jpeg[place : place + length]
        place += length
    return out + jpeg[place:]
