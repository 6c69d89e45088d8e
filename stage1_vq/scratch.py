"""Feature maps that are written and read a few rows at a time, so that they need not be held in memory.

Axes: C channels, H W positions, G groups of channels, r rows of a band.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from taming.disk import free_bytes
from taming.errors import UserError


@dataclass
class Moments:
    """Mean and sum of squared deviations of each group of channels, summed up band by band, (1, G) fp64."""

    groups: int
    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, band: Tensor) -> None:
        """Take in more rows (1, C, r, W): the moments of both together (Chan et al. 1983)."""
        variance, mean = torch.var_mean(band.float(), dim=(2, 3), correction=0)
        mean, variance = (part.double().unflatten(1, (self.groups, -1)) for part in (mean, variance))
        group_mean = mean.mean(-1)
        added = band.shape[1] // self.groups * band.shape[2] * band.shape[3]
        squares = (variance + (mean - group_mean[..., None]).square()).mean(-1) * added
        count = self.count + added
        difference = group_mean - self.mean
        self.mean = self.mean + difference * (added / count)
        self.squares = self.squares + squares + difference.square() * (self.count * added / count)
        self.count = count

    def statistics(self, eps: float) -> tuple[Tensor, Tensor]:
        """(mean, 1 / standard deviation), each (1, G), as GroupNorm uses them."""
        assert isinstance(self.mean, Tensor)
        assert isinstance(self.squares, Tensor)
        return self.mean, (self.squares / self.count + eps).rsqrt()


class FeatureMap:
    """(1, C, H, W) in host memory or in a file. Bands come and go on the device of the computation."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        channels_last: bool,
        groups: int,
        file: FileIO | None,
    ) -> None:
        self.channels, self.height, self.width = shape
        self.dtype, self.device = dtype, device
        self.pattern = "1 c r w -> r w c" if channels_last else "1 c r w -> r c w"
        self.row_shape = (self.width, self.channels) if channels_last else (self.channels, self.width)
        self.groups, self.moments = groups, Moments(groups)
        self.file = file
        self.held = torch.empty(self.height, *self.row_shape, dtype=dtype) if file is None else None

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) as (1, C, r, W)."""
        if self.held is not None:
            rows = self.held[top:bottom]
        else:
            assert self.file is not None
            rows = torch.empty(bottom - top, *self.row_shape, dtype=self.dtype)
            view, done = _bytes_of(rows), 0
            self.file.seek(top * self._row_bytes)
            while done < len(view):
                got = self.file.readinto(view[done:])
                assert got, "rows are read after they were written"
                done += got
        left, right = self.pattern.split(" -> ")
        return rearrange(rows.to(self.device), f"{right} -> {left}")

    def write(self, top: int, band: Tensor) -> None:
        """Rows from `top` on as (1, C, r, W); they count in `moments`."""
        if self.channels % self.groups == 0:
            self.moments.add(band)
        rows = rearrange(band.detach(), self.pattern)
        if self.held is not None:
            self.held[top : top + band.shape[2]] = rows
            return
        assert self.file is not None
        self.file.seek(top * self._row_bytes)
        view = _bytes_of(rows.contiguous().cpu())
        done = 0
        try:
            while done < len(view):
                done += self.file.write(view[done:]) or 0
        except OSError as error:
            raise UserError(
                f"a feature map of {self.height * self._row_bytes / 2**20:.0f} MiB could not be written to "
                f"the folder for temporary files: {error}; set TMPDIR to a folder with more space"
            ) from None

    def restart_moments(self) -> None:
        """Forget the moments, before the map is written anew."""
        self.moments = Moments(self.groups)

    def close(self) -> None:
        """Give memory or file back."""
        self.held = None
        if self.file is not None:
            self.file.close()

    @property
    def _row_bytes(self) -> int:
        return self.width * self.channels * self.dtype.itemsize


class Scratch:
    """Makes feature maps: those of up to `budget` values in memory, others in a file that goes away.

    With an accelerator all are in host memory: it is the device's that is short.
    """

    def __init__(
        self, *, budget: int, dtype: torch.dtype, device: torch.device, channels_last: bool, groups: int
    ) -> None:
        self.budget, self.dtype, self.device = budget, dtype, device
        self.channels_last, self.groups = channels_last, groups
        self.open_files = ExitStack()

    def new_map(self, channels: int, height: int, width: int) -> FeatureMap:
        """Room for (1, channels, height, width). Raises UserError where the disk has none."""
        values = channels * height * width
        file = None
        if values > self.budget and self.device.type == "cpu":
            self._check_space(values * self.dtype.itemsize)
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the stack
            self.open_files.enter_context(file)
        return FeatureMap(
            (channels, height, width),
            dtype=self.dtype,
            device=self.device,
            channels_last=self.channels_last,
            groups=self.groups,
            file=file,
        )

    @contextmanager
    def until_done(self) -> Iterator[Scratch]:
        """Closes every file at the end, whatever happens."""
        with self.open_files:
            yield self

    def _check_space(self, needed: int) -> None:
        folder = Path(tempfile.gettempdir())
        free = free_bytes(folder)
        if needed > free:
            raise UserError(
                f"painting in tiles needs {needed / 2**20:.0f} MiB in {folder}, which has "
                f"{free / 2**20:.0f} MiB free; set TMPDIR to a folder with more space, or paint a smaller "
                "picture"
            )


def _bytes_of(rows: Tensor) -> memoryview:
    return memoryview(rows.view(torch.uint8).flatten().numpy().data)
