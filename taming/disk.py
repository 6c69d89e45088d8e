"""Room on a disk: how much there is, and what is said where it ran out."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from taming.errors import FaultError
from taming.units import format_bytes

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing fails with on a full disk, past a quota, or past a limit on files."""


def full_disk(
    error: OSError,
    what: str,
    path: Path,
    needed: int | None = None,
    *,
    partial: Path | None = None,
    way_on: str = "free some space, or choose a folder on another disk",
) -> FaultError:
    """The error that says that `what` at `path`, of `needed` bytes, was not written.

    `partial` is what was written of it, which goes and so counts as free.
    """
    free = free_bytes(path) + (folder_bytes(partial) if partial is not None else 0)
    needs = "" if needed is None else f"it needs {format_bytes(needed)}, and "
    return FaultError(
        f"{what} {path} was not written ({error.strerror or error}): {needs}{format_bytes(free)} are free "
        f"there; {way_on}; what was saved before is whole"
    )


@contextmanager
def room_for(what: str, path: Path) -> Iterator[None]:
    """Where the block fails for want of room on the disk, raise FaultError in place of OSError."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise full_disk(error, what, path) from error


def free_bytes(path: Path) -> int:
    """Bytes that a user may still write on the disk of `path`, which need not be there yet."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(
        os.path.getsize(os.path.join(place, name)) for place, _, files in os.walk(folder) for name in files
    )
