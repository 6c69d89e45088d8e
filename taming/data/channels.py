"""Pictures of any number of channels and any depth: grey, RGB and RGBA files, and .npy arrays.

Axes: C channels, H W pixels.
"""

from __future__ import annotations

import io
import math

import numpy as np

from taming.data.picture import (
    MAX_PIXELS,
    FileBytes,
    Source,
    check_is_file,
    read_picture,
    read_size,
    suffix_of,
)
from taming.data.transforms import Crop, crop_picture, crop_plane, needed_size, planes_of
from taming.errors import BadSample, DataError

ARRAY_SUFFIX = ".npy"
# How NumPy and `_array_of` say that there was less than there should be.
_CUT_OFF = ("length is greater than file size", "shorter than", "EOF: reading")
FILE_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}
"""What picture files can be read as."""


def read_pixels(
    path: Source,
    channels: int,
    *,
    crop: Crop | None = None,
    size: tuple[int, int] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """A picture or array as (C, H, W): uint8, or float32 in [-1, 1] where the file holds more than 8 bits.

    Of picture files `channels` is 1 (16-bit grey keeps its depth), 3 or 4 (opaque where there is no alpha).
    An array is (C, H, W) uint8, uint16, or float32 in [-1, 1], never a pickle. With `crop` the box is cut
    out and brought to `size` (H, W), antialiased (bicubic). Raises DataError.
    """
    if suffix_of(path) == ARRAY_SUFFIX:
        return _cut(_read_array(path, channels, max_pixels), crop, size)
    mode = file_mode(path, channels)
    at_least = None if crop is None or size is None else needed_size(crop, size)
    image = read_picture(path, at_least=at_least, max_pixels=max_pixels, mode=mode)
    if image.mode == "F":  # deep grey
        return _cut(np.array(image)[None], crop, size)
    return planes_of(image) if crop is None or size is None else crop_picture(image, crop, size)


def read_pixel_size(path: Source, channels: int, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) from the file's header alone, once it is sure to give `channels`. Raises DataError."""
    if suffix_of(path) == ARRAY_SUFFIX:
        _, height, width = _open_array(path, channels, max_pixels).shape
        return height, width
    file_mode(path, channels)
    return read_size(path, max_pixels=max_pixels)


def read_any_size(path: Source, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) from the header, whatever channels there are. Raises BadSample."""
    if suffix_of(path) == ARRAY_SUFFIX:
        _, height, width = _open_array(path, None, max_pixels).shape
        return height, width
    return read_size(path, max_pixels=max_pixels)


def file_mode(path: Source, channels: int) -> str:
    """Pillow's name for a picture file of so many channels. Raises DataError where there is none."""
    if channels not in FILE_CHANNELS:
        raise DataError(
            f"picture {path} can be read with 1, 3 or 4 channels, not {channels}; save other counts as"
            f" {ARRAY_SUFFIX} arrays (C, H, W)"
        )
    return FILE_CHANNELS[channels]


def _open_array(path: Source, channels: int | None, max_pixels: int) -> np.ndarray:
    """The array as it lies in its file, mapped, its header checked."""
    check_is_file(path)
    try:
        if isinstance(path, FileBytes):
            array = _array_of(path.data)
        else:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise ValueError("it holds several arrays")
    except (OSError, ValueError, EOFError, TypeError, RecursionError, MemoryError) as error:
        reason = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        if isinstance(error, EOFError) or any(word in str(error) for word in _CUT_OFF):
            reason = "truncated"
        # NumPy's own advice for pickles is to load them unsafely.
        said = "it holds pickled objects, which are never loaded" if "pickle" in str(error) else error
        raise BadSample(f"array {path} cannot be read: {said}; write it with numpy.save", reason) from None
    if array.ndim != 3 or channels not in (None, array.shape[0]):
        raise BadSample(
            f"array {path} is {array.shape}, not (C, H, W) with {channels or 'any'} channels; set"
            " data.channels, or move the axis of the channels to the front",
            "mismatched",
        )
    if array.dtype not in (np.uint8, np.uint16, np.float32):
        raise BadSample(
            f"array {path} is {array.dtype}; save it as uint8, uint16, or float32 in [-1, 1]", "mismatched"
        )
    if array.shape[1] * array.shape[2] > max_pixels or not array.size:
        raise BadSample(
            f"array {path} has {array.shape[2]}x{array.shape[1]} pixels, not 1 to data.max_pixels ="
            f" {max_pixels}; make it smaller or raise data.max_pixels",
            "too large",
        )
    return array


def _array_of(data: bytes) -> np.ndarray:
    """The array in the bytes of an .npy file, without a copy. Raises ValueError."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of the format is not read here")
    # Sizes are compared before anything is made: a header may claim any shape.
    if dtype.hasobject or len(data) - file.tell() < math.prod(shape) * dtype.itemsize:
        raise ValueError("it holds objects" if dtype.hasobject else "it is shorter than its header says")
    array = np.frombuffer(data, dtype, count=math.prod(shape), offset=file.tell())
    return array.reshape(shape, order="F" if fortran_order else "C")


def _read_array(path: Source, channels: int, max_pixels: int) -> np.ndarray:
    array = np.array(_open_array(path, channels, max_pixels), order="C")
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 32767.5 - 1
    if array.dtype == np.float32 and not (np.isfinite(array).all() and np.abs(array).max() <= 1):
        raise BadSample(
            f"array {path} holds values from {array.min()} to {array.max()}; scale it to [-1, 1]",
            "mismatched",
        )
    return array


def _cut(planes: np.ndarray, crop: Crop | None, size: tuple[int, int] | None) -> np.ndarray:
    if crop is None or size is None:
        return planes
    cut = np.stack([crop_plane(plane.astype(np.float32), crop, size) for plane in planes])
    # Bicubic filters overshoot.
    if planes.dtype == np.uint8:
        return cut.round().clip(0, 255).astype(np.uint8)
    return cut.clip(-1, 1)
