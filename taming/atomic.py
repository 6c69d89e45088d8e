"""Files and folders that are whole or absent, whenever the process or the machine stops.

What is written goes beside its place under another name, onto the disk, and then takes its place at once:

    NAME.tmp        being written, or what NAME held until a moment ago; never counts
    NAME.old        what NAME held, where a file system cannot swap folders; counts while there is no NAME
    NAME.removing   being removed; never counts
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY, REPLACED, REMOVING = ".tmp", ".old", ".removing"
"""Ends of the names beside a folder's own."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a path to write a file at, which becomes `path` when the block ends; until then that stays."""
    aside = _beside(path, TEMPORARY)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except Exception:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all. Raises OSError."""
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to write into, which takes the place of `folder` when the block ends.

    All that `folder` held is replaced. Where the block raises, `folder` stays as it was.
    """
    temporary = _beside(folder, TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for place, _, files in os.walk(temporary):
            for name in files:
                sync(Path(place) / name)
            sync(Path(place))
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    put_in_place(temporary, folder)


def put_in_place(made: Path, folder: Path) -> None:
    """Let the folder `made`, beside `folder` and synced, be `folder` from now on; what that held goes."""
    aside = _beside(folder, REPLACED)
    if not folder.exists():
        os.replace(made, folder)
    elif not _swap(made, folder):
        remove_folder(aside)
        os.replace(folder, aside)
        os.replace(made, folder)
    sync(folder.parent)
    for left in (made, aside):
        shutil.rmtree(left, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder, which does not count any more from the first moment on; nothing if it is not there.

    What cannot be removed of it stays under its other name. Raises OSError where it cannot be renamed.
    """
    if not folder.exists():
        return
    doomed = _beside(folder, REMOVING)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def standing(folder: Path) -> Path:
    """`folder`, or what it held where its replacement was interrupted."""
    aside = _beside(folder, REPLACED)
    return aside if aside.is_dir() and not folder.exists() else folder


def sync(path: Path) -> None:
    """Wait until the disk holds a file, or a folder's entries."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync folders, and write entries at once.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _swap(first: Path, second: Path) -> bool:
    """Exchange two folders in one moment (Linux's renameat2); False where the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(second))
