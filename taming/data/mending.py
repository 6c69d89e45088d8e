"""What Pillow reads otherwise than the file means, found by pictures of known pixels."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image, ImageChops, ImageFile

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF 6.0, section 8
_WHITE_IS_ZERO = 0


def grey_bits(image: Image.Image) -> int:
    """Bits of a pixel of a grey picture that was opened and not loaded yet: 2 and 4 become 8 on loading."""
    arguments = image.tile[0][3] if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    raw = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    found = re.fullmatch(r"L;([24])I?R?", raw) if isinstance(raw, str) else None
    return int(found[1]) if found else 8


def spread(bits: int) -> int:
    """What a value of so many bits was multiplied with to fill 8."""
    return 255 // (2**bits - 1)


def mended(image: Image.Image, bits: int) -> Image.Image:
    """A picture that was loaded, as its file means it; `bits` are what `grey_bits` gave.

    Inks that are no Adobe's, deep grey of 12 bits or with white at zero, and the transparent value of greys
    of few bits.
    """
    if image.mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        # Adobe stores inks inverted and leaves its mark; Pillow takes every file for Adobe's.
        return _in_place_of(image, ImageChops.invert(image))
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        depth = int(np.ravel(tags.get(_BITS_PER_SAMPLE, 16))[0])
        inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
        if depth < 16 or inverted:
            values = np.asarray(image).astype(np.float64) * (65535 / (2**depth - 1))
            values = values.round().clip(0, 65535).astype(np.uint16)
            return _in_place_of(image, Image.fromarray(65535 - values if inverted else values))
    clear = image.info.get("transparency")
    if bits < 8 and image.mode == "L" and isinstance(clear, int):
        image.info["transparency"] = clear * spread(bits)
    return image


def _in_place_of(image: Image.Image, other: Image.Image) -> Image.Image:
    """`other` with all that is known of `image` besides its pixels."""
    other.info = image.info
    return other
