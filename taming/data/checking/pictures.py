"""What is wrong with one picture and its maps, wherever they lie."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext

from taming.data.channels import read_pixel_size, read_pixels
from taming.data.checking.findings import Findings
from taming.data.config import PicturesConfig
from taming.data.folder import map_size, same_aspect
from taming.data.picture import Source, open_source, read_depth, read_labels
from taming.data.png import png_fault
from taming.data.stored import MapKind
from taming.errors import BadSample, DataError

_LARGE = 32_000_000
"""Pictures of more pixels than this are decoded one at a time, so that memory does not grow with threads."""


class PictureCheck:
    """Looks at pictures as `config` would read them; several threads may share one.

    With `decode` every picture and map is decoded in full and every label is looked at; else headers are
    read.
    """

    def __init__(self, config: PicturesConfig, *, decode: bool) -> None:
        self.config, self.decode = config, decode
        self._large = threading.Lock()

    def __call__(
        self, image: Source, maps: Mapping[MapKind, Source], findings: Findings
    ) -> tuple[int, int] | None:
        """(H, W) of the picture, or None where that cannot be told; what is wrong goes to `findings`."""
        config, size = self.config, None
        with findings.catch(image):
            size = read_pixel_size(image, config.channels, max_pixels=config.max_pixels)
        if size is not None:
            self._check_picture(image, size, findings)
        for kind, source in maps.items():
            with findings.catch(source):
                self._check_map(kind, source, image, size)
        return size

    def _check_picture(self, image: Source, size: tuple[int, int], findings: Findings) -> None:
        config = self.config
        height, width = config.height_width
        if (size[0] < height or size[1] < width) and not config.upscale:
            detail = (
                f"picture {image} is {size[1]}x{size[0]}, smaller than the crop {width}x{height}; remove it,"
                " set data.upscale=true, or make data.size smaller"
            )
            findings.add(image, "too small", detail)
        if self.decode:
            with findings.catch(image), self._room(size):
                read_pixels(image, config.channels, max_pixels=config.max_pixels)
                _check_sums(image)

    def _check_map(self, kind: MapKind, source: Source, image: Source, size: tuple[int, int] | None) -> None:
        """Raises DataError."""
        config, limit = self.config, self.config.max_pixels
        own = map_size(source, config, kind)
        if self.decode:
            with self._room(own):
                if kind == "segmentation":
                    self._check_labels(source)
                elif kind == "depth":
                    read_depth(source, max_pixels=limit)
                else:
                    read_pixels(source, config.condition_channels, max_pixels=limit)
            _check_sums(source)
        if size is not None and not same_aspect(size, own):
            raise DataError(
                f"map {source} is {own[1]}x{own[0]}, but its picture {image} is {size[1]}x{size[0]}: the"
                " aspects differ; make the map cover the same view"
            )

    def _check_labels(self, source: Source) -> None:
        labels = read_labels(source, max_pixels=self.config.max_pixels)
        lowest, highest, most = int(labels.min()), int(labels.max()), self.config.num_labels
        assert most is not None
        if lowest < 0 or highest >= most:
            raise DataError(
                f"map {source} holds labels from {lowest} to {highest}, but they lie in [0, {most}); mend it"
                f" or set data.num_labels={highest + 1}"
            )

    def _room(self, size: tuple[int, int]) -> threading.Lock | nullcontext[None]:
        return self._large if size[0] * size[1] > _LARGE else nullcontext()


def _check_sums(source: Source) -> None:
    """Damage that left the pixels whole: training does not mind, but a copy went wrong. Raises BadSample."""
    with open_source(source) as file:
        fault = png_fault(file)
    if fault is not None:
        what = "is cut off behind its pixels" if fault == "truncated" else "has a wrong checksum"
        raise BadSample(f"picture {source} {what}, though its pixels can be read; fetch it again", fault)
