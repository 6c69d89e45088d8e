"""Pictures and maps on disk: read right, whatever their format and mode, and written.

Axes: N pictures, C channels, H W pixels.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from taming.data.mending import grey_bits, mended, spread
from taming.data.png import png_fault
from taming.errors import BadSample, DataError

FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
"""Only these are ever tried: formats that run programs (EPS) or hold other files are never sniffed."""

SUFFIXES: frozenset[str] = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)

MAX_PIXELS = 200_000_000

_ORIENTATION = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
# What Pillow's decoders raise on damaged files, found by feeding them such files.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)
# How Pillow says that there was less than there should be.
_CUT_OFF = ("truncated", "unexpected end", "not enough image data", "buffer is not large enough")
_open_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    # A process that is forked while another thread holds the lock would wait for it for ever.
    os.register_at_fork(
        before=_open_lock.acquire, after_in_parent=_open_lock.release, after_in_child=_open_lock.release
    )


@dataclass(frozen=True)
class FileBytes:
    """A file that was read already, from a shard say; messages show its name."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


Source = str | Path | FileBytes
"""What pictures and maps are read from."""


def suffix_of(source: Source) -> str:
    """The suffix of a file's name in small letters, with its dot."""
    return Path(str(source)).suffix.lower()


def open_source(source: Source) -> BinaryIO:
    """The bytes of a source as a file. Raises OSError."""
    return io.BytesIO(source.data) if isinstance(source, FileBytes) else Path(source).open("rb")


def check_is_file(source: Source) -> None:
    """Raises BadSample for folders, pipes and devices: reading from those may never end."""
    if not isinstance(source, FileBytes) and not Path(source).is_file() and Path(source).exists():
        raise BadSample(f"{source} has the name of a picture and is no file; remove it", "unreadable")


def read_picture(
    path: Source,
    *,
    at_least: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
    mode: str = "RGB",
) -> Image.Image:
    """The picture in 8 bits, upright by its EXIF orientation; of an animation, the first frame.

    `mode` is RGB, L or RGBA. 16-bit grey is scaled by 1/257, not clipped; as L it keeps its depth: mode F,
    in [-1, 1]. Transparent pixels are laid over white, but for RGBA. Where `at_least` (H, W) is given, a
    large JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but not below it.
    Raises BadSample, with the path and the reason, for a file that is damaged, of another format, or of
    more than `max_pixels` pixels.
    """
    with _opened(path, max_pixels) as image:
        if at_least is not None and image.format == "JPEG":
            height, width = at_least
            if _orientation(image) in _TRANSPOSED:
                height, width = width, height
            image.draft("RGB", (width, height))
        return _convert(_load(image), path, mode)


def read_labels(path: Source, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A label map as (H, W) int64: the grey value, or the palette's index, of each pixel.

    Raises BadSample for a damaged file or one in colour.
    """
    with _opened(path, max_pixels) as image:
        bits = grey_bits(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise BadSample(
                f"map {path} is a picture in mode {image.mode}, not a label map; save it as 8 or 16-bit grey"
                " or with a palette, the value of a pixel being its label",
                "mismatched",
            )
        return np.asarray(image).astype(np.int64) // spread(bits)


def read_depth(path: Source, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An 8 or 16-bit grey map as (H, W) float32 in [0, 1].

    Raises BadSample for a damaged file or one of another mode.
    """
    with _opened(path, max_pixels) as image:
        image = _load(image)
        values = np.asarray(image)
        if image.mode == "L":
            return values.astype(np.float32) / 255
        if image.mode.startswith("I;16"):
            return values.astype(np.float32) / 65535
        if image.mode == "I" and values.min() >= 0 and values.max() <= 65535:
            return values.astype(np.float32) / 65535
        raise BadSample(
            f"map {path} is in mode {image.mode}, not a depth map; save it as 8 or 16-bit grey", "mismatched"
        )


def read_size(path: Source, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) of the upright picture, from the file's header alone. Raises BadSample."""
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":
            return height, width  # Pillow has turned it already
        return (width, height) if _orientation(image) in _TRANSPOSED else (height, width)


def to_uint8(images: Tensor) -> Tensor:
    """(..., C, H, W) in [-1, 1] -> uint8; values outside are clipped."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_png(image: Tensor, path: str | Path) -> None:
    """Write one picture (C, H, W) in [-1, 1], C = 1, 3 or 4 (RGBA), as PNG; its folder is made."""
    pixels = to_uint8(image).cpu()
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ValueError(f"one picture is (1, 3 or 4, H, W), not {tuple(pixels.shape)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels[0].numpy() if pixels.shape[0] == 1 else rearrange(pixels, "c h w -> h w c").numpy()
    Image.fromarray(np.ascontiguousarray(array)).save(path, format="PNG")


def save_grey(values: Tensor, path: str | Path) -> None:
    """Write whole numbers (H, W) in [0, 65535] as a grey PNG: 8 bits where they fit, else 16."""
    array = values.cpu().numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8 if array.max() < 256 else np.uint16)).save(path, format="PNG")


def tile(images: Tensor, columns: int, pad: int = 2) -> Tensor:
    """Lay pictures (N, C, H, W) in [-1, 1] out in rows of `columns` on white: (C, H', W')."""
    num, channels, height, width = images.shape
    if num < 1 or columns < 1:
        raise ValueError(f"tile needs pictures and columns, not {num} and {columns}")
    columns = min(columns, num)
    rows = -(-num // columns)
    sheet = images.new_ones(channels, rows * (height + pad) + pad, columns * (width + pad) + pad)
    for n in range(num):
        top, left = (n // columns) * (height + pad) + pad, (n % columns) * (width + pad) + pad
        sheet[:, top : top + height, left : left + width] = images[n]
    return sheet


@contextmanager
def _opened(path: Source, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file by its header; whatever is wrong with it, then or on reading, becomes a BadSample."""
    try:
        check_is_file(path)
        with _open_unlimited(path) as image:
            if image.width * image.height > max_pixels:
                raise BadSample(
                    f"picture {path} has {image.width}x{image.height} pixels, more than data.max_pixels ="
                    f" {max_pixels}; make it smaller or raise data.max_pixels",
                    "too large",
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise BadSample(f"picture {path} does not exist", "missing") from None
    except _BROKEN as error:
        raise _refusal(path, error) from None


def _refusal(path: Source, error: Exception) -> BadSample:
    """What is said of a file that Pillow could not read."""
    fault = None
    with suppress(OSError), open_source(path) as file:
        if not file.read(1):
            return BadSample(f"picture {path} is empty; replace it or remove it", "truncated")
        fault = png_fault(file)
    if fault is not None:
        what = "is cut off" if fault == "truncated" else "is damaged: a checksum in it is wrong"
        return BadSample(f"picture {path} {what}; replace it or remove it", fault)
    if isinstance(error, UnidentifiedImageError):
        names = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        return BadSample(
            f"picture {path} is damaged or not a {names} file; convert it or remove it", "unreadable"
        )
    reason = "truncated" if any(word in str(error).lower() for word in _CUT_OFF) else "unreadable"
    return BadSample(f"picture {path} cannot be read: {error}; replace it or remove it", reason)


def _open_unlimited(path: Source) -> Image.Image:
    # Pillow's own limit is a global: it is set aside, one thread at a time, while a header is read, since
    # our limit may be higher and is checked right after.
    with _open_lock:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            file = io.BytesIO(path.data) if isinstance(path, FileBytes) else path
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _load(image: Image.Image) -> Image.Image:
    """Decode: upright, and as the file means it."""
    bits = grey_bits(image)
    image.load()
    image = mended(image, bits)
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _orientation(image: Image.Image) -> int:
    # PngImageFile.getexif decodes the whole picture in search of a late chunk: the header must do.
    exif = Image.Image.getexif(image)
    value = exif.get(_ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _convert(image: Image.Image, path: Source, mode: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = _deep_grey(image, path)
        clear = image.info.get("transparency")  # the one value that is transparent
        if mode == "L":
            deep = values.astype(np.float32) / 32767.5 - 1
            return Image.fromarray(deep if clear is None else np.where(values == clear, np.float32(1), deep))
        grey = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
        if clear is None:
            return grey.convert(mode)
        grey.putalpha(Image.fromarray(values != clear).convert("L"))
        return _convert(grey, path, mode)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        if mode == "RGBA":
            return image
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB").convert(mode)
    return image if image.mode == mode else image.convert("RGB").convert(mode)


def _deep_grey(image: Image.Image, path: Source) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise BadSample(
            f"picture {path} is in mode {image.mode} with values from {values.min()} to {values.max()};"
            " save it with 8 or 16 bits a channel",
            "mismatched",
        )
    return values
