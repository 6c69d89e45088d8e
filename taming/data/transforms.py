"""One crop, scale and mirror image for a picture and all of its maps.

A crop is found once, in the picture's own coordinates, and cut out of the picture and of each map with a
single resize from that box, so that they stay aligned even where a map has another resolution.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Crop:
    """A box in shares of the picture's height and width, and whether it is mirrored."""

    top: float
    left: float
    height: float
    width: float
    flip: bool = False

    @property
    def frame(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in [0, 1] of the box in the whole picture, which is mirrored where the crop is."""
        x0, x1 = self.left, self.left + self.width
        if self.flip:
            x0, x1 = 1 - x1, 1 - x0
        return max(x0, 0.0), self.top, min(x1, 1.0), min(self.top + self.height, 1.0)


def uniforms(seed: int, epoch: int, key: str, count: int) -> list[float]:
    """`count` <= 8 uniform numbers in [0, 1): a pure function of its arguments, on every machine.

    It is a hash of a counter, so that what one sample draws depends on no other sample's draws.
    """
    assert 0 < count <= 8
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8 * count).digest()
    # 53 bits are what a float holds.
    return [(int.from_bytes(digest[8 * n : 8 * n + 8], "little") >> 11) * 2.0**-53 for n in range(count)]


def choose_crop(
    picture: tuple[int, int],
    size: tuple[int, int],
    *,
    resize: int | None = None,
    upscale: bool = False,
    position: tuple[float, float] = (0.5, 0.5),
    scale: float = 1.0,
    flip: bool = False,
) -> Crop:
    """Bring the shorter side of `picture` (H, W) to `resize` times `scale`, then crop `size` at `position`.

    Without `resize` the picture becomes as small as still covers the crop. Unless `upscale`, it is never
    enlarged: a picture below `resize` is cropped as it is. `position` runs over [0, 1] from the top left
    to the bottom right. The picture must be at least as large as the crop, or `upscale` be set. A
    crop that is not scaled lies on whole pixels.
    """
    height, width = picture
    cover = max(size[0] / height, size[1] / width)  # the least factor that covers the crop
    factor = cover if resize is None else resize / min(height, width)
    factor *= scale
    if not upscale:
        factor = min(factor, 1.0)
    factor = max(factor, cover)
    # Rounding must not let the box leave the picture.
    box_height, box_width = min(1.0, size[0] / factor / height), min(1.0, size[1] / factor / width)
    top, left = (1 - box_height) * position[0], (1 - box_width) * position[1]
    if factor == 1:  # whole pixels: nothing is then interpolated
        top, left = round(top * height) / height, round(left * width) / width
    return Crop(top, left, box_height, box_width, flip)


def needed_size(crop: Crop, size: tuple[int, int]) -> tuple[int, int]:
    """(H, W) that the whole picture must at least have for a clean crop of `size`."""
    # Twice the pixels are left to the antialiasing filter: so a quickly decoded JPEG comes within 45 dB of
    # the full one, which is less than bicubic and Lanczos differ; decoded to size, it comes within 36.
    return int(2 * size[0] / crop.height), int(2 * size[1] / crop.width)


def crop_picture(image: Image.Image, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """(C, H, W) uint8, antialiased (bicubic)."""
    box = _box(crop, image.height, image.width)
    left, top = round(box[0]), round(box[1])
    whole = (left, top, left + size[1], top + size[0])
    if max(abs(edge - pixel) for edge, pixel in zip(box, whole, strict=True)) < 1e-6:
        cut = image.crop(whole)  # the filter would give the same pixels
    else:
        cut = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return planes_of(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.flip else cut)


def planes_of(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8 of a picture with 8 bits a channel, in memory of its own."""
    # Band by band takes half the time of (H, W, C) and a change of axes.
    bands = image.getbands()
    data = bytearray().join(image.tobytes("raw", band) for band in bands)
    return np.frombuffer(data, np.uint8).reshape(len(bands), image.height, image.width)


def crop_labels(labels: np.ndarray, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of the same type: each pixel takes the label at its centre."""
    rows = _centres(crop.top, crop.height, size[0], labels.shape[0])
    columns = _centres(crop.left, crop.width, size[1], labels.shape[1])
    return _mirror(labels[rows[:, None], columns[None, :]], crop)


def crop_depth(depth: np.ndarray, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32, antialiased (bilinear)."""
    return crop_plane(depth, crop, size, resampling=Image.Resampling.BILINEAR)


def crop_plane(
    plane: np.ndarray,
    crop: Crop,
    size: tuple[int, int],
    *,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """(H, W) float32 from a plane of real numbers, antialiased; bicubic overshoots."""
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    cut = image.resize((size[1], size[0]), resampling, box=_box(crop, image.height, image.width))
    return _mirror(np.asarray(cut), crop)


def _box(crop: Crop, height: int, width: int) -> tuple[float, float, float, float]:
    left, top = crop.left * width, crop.top * height
    # Pillow refuses a box that leaves the picture by a rounding error.
    return (
        left,
        top,
        min(float(width), left + crop.width * width),
        min(float(height), top + crop.height * height),
    )


def _centres(start: float, length: float, count: int, pixels: int) -> np.ndarray:
    centres = (start + (np.arange(count) + 0.5) / count * length) * pixels
    return np.minimum(centres.astype(np.int64), pixels - 1)


def _mirror(array: np.ndarray, crop: Crop) -> np.ndarray:
    # A copy: torch wants memory that it may write to.
    return np.array(array[:, ::-1] if crop.flip else array, order="C")
