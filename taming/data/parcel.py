"""Objects that hold tensors, taken apart so that the tensors' bytes can travel by themselves."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class Parcel:
    """An object whose CPU tensors are left out of its pickle: `rest`, and `size` bytes of tensors."""

    ALIGNMENT = 64

    def __init__(self, value: Any) -> None:
        self.size = 0
        self._tensors: list[tuple[int, Tensor]] = []
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(value)
        self.rest = buffer.getvalue()

    def write(self, block: Tensor) -> None:
        """Lay the tensors into `block` (>= size,) uint8."""
        for offset, tensor in self._tensors:
            data = tensor.reshape(-1).view(torch.uint8)
            block[offset : offset + len(data)].copy_(data)

    def place(self, tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
        """Where a tensor will lie, of which kind and shape it is."""
        offset = self.size
        self._tensors.append((offset, tensor.detach()))
        self.size = offset + -(-tensor.nbytes // self.ALIGNMENT) * self.ALIGNMENT
        return offset, tensor.dtype, tuple(tensor.shape)


def unpack(rest: bytes, block: Tensor) -> Any:
    """The object again. Its tensors are views of `block` (size,) uint8.

    `rest` must come from a process of our own: it is unpickled.
    """
    return _Unpickler(io.BytesIO(rest), block).load()


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, parcel: Parcel) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._parcel = parcel

    def persistent_id(self, value: Any) -> tuple[int, torch.dtype, tuple[int, ...]] | None:
        return self._parcel.place(value) if isinstance(value, Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, block: Tensor) -> None:
        super().__init__(buffer)
        self._block = block

    def persistent_load(self, identifier: tuple[int, torch.dtype, tuple[int, ...]]) -> Tensor:
        offset, dtype, shape = identifier
        count = dtype.itemsize
        for length in shape:
            count *= length
        return self._block[offset : offset + count].view(dtype).view(shape)
