"""Files from http and https addresses, and a folder of bounded size that keeps them.

Files are known by their sha256: no name that a server tells becomes a path, several sets share what is equal,
and what has arrived is what the index says.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import BinaryIO, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from taming.errors import DataError
from taming.units import format_bytes


class _Wrong(Exception):
    """What has arrived is not what was asked for."""


T = TypeVar("T")
_FAULTS = (URLError, HTTPException, TimeoutError, ConnectionError, SSLError, UnicodeError, _Wrong)
ATTEMPTS = 4
TIMEOUT_SECONDS = 30.0
"""Of silence: a slow transfer may take longer."""
_PAUSE_SECONDS = 0.5
_CHUNK = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_address(root: str) -> bool:
    """Whether data lies at an http or https address."""
    return root.lower().startswith(("http://", "https://"))


def join_address(root: str, name: str) -> str:
    """The address of a file beside others; what follows a question mark goes with each."""
    parts = urlsplit(root)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}", fragment=""))


def shown(address: str) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def fetch(address: str, *, limit: int) -> bytes:
    """A file of at most `limit` bytes. Raises DataError after several attempts."""

    def attempt() -> bytes:
        with _open(address) as answer:
            data = answer.read(limit + 1)
        if len(data) > limit:
            raise DataError(f"{shown(address)} has more than {format_bytes(limit)}; check the address")
        return data

    return _with_patience(address, attempt)


class FileCache:
    """Files from elsewhere, by their sha256; several processes may share the folder.

    A file is FOLDER/SHA256, and SHA256.tmp until it has arrived. Its time of change is that of its last use.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size

    def get(self, address: str, size: int, sha256: str) -> Path:
        """The file of an address, fetched unless it is here. Raises DataError."""
        assert _SHA256.fullmatch(sha256)
        path = self.folder / sha256
        try:
            if not self._touch(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                with _locked(self.folder / f"{sha256}.tmp", path) as file:
                    if file is not None:
                        self._make_room(size, keep=sha256)
                        _with_patience(address, lambda: _download(address, file, size, sha256))
                        os.replace(self.folder / f"{sha256}.tmp", path)
        except OSError as error:
            raise DataError(
                f"{shown(address)} cannot be kept in {self.folder} ({error}); it needs"
                f" {format_bytes(size)}: free that much, lower data.cache_size or set data.cache to"
                " another disk"
            ) from None
        return path

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except OSError:
            return path.is_file()  # of somebody else's cache, perhaps, that can only be read
        return True

    def _make_room(self, size: int, keep: str) -> None:
        """Remove what is unfinished, then what was unused for longest, until `size` more bytes fit."""
        kept: list[tuple[bool, float, int, Path]] = []
        for path in self.folder.iterdir():
            name = path.name.removesuffix(".tmp")
            if _SHA256.fullmatch(name) and name != keep:
                try:
                    facts = path.stat()
                except FileNotFoundError:
                    continue  # another process was faster
                kept.append((name == path.name, facts.st_mtime, facts.st_size, path))
        total = sum(length for _, _, length, _ in kept)
        for finished, _, length, path in sorted(kept):
            if total + size <= self.size:
                return
            if finished or _abandoned(path):
                # A file that is being read stays readable until it is closed.
                path.unlink(missing_ok=True)
                total -= length


@contextmanager
def _locked(temporary: Path, final: Path) -> Iterator[BinaryIO | None]:
    """The empty temporary file, held by this process alone; None where another has finished it by then.

    The lock goes with its process, however that ends.
    """
    while True:
        with temporary.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if final.exists():
                if _is_at(file, temporary):
                    temporary.unlink(missing_ok=True)
                yield None
                return
            if _is_at(file, temporary):  # else it was renamed or removed while this process waited
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _abandoned(temporary: Path) -> bool:
    """Whether no process is writing to a temporary file."""
    try:
        with temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return False
    return True


def _download(address: str, file: BinaryIO, size: int, sha256: str) -> None:
    file.seek(0)
    file.truncate()
    digest, length = hashlib.sha256(), 0
    with _open(address) as answer:
        while length <= size and (chunk := answer.read(_CHUNK)):
            file.write(chunk)
            digest.update(chunk)
            length += len(chunk)
    if length != size:
        what = "more" if length > size else "less"
        raise _Wrong(f"it gave {what} than the {size} bytes that the index says")
    if digest.hexdigest() != sha256:
        raise _Wrong("it gave other bytes than the index says")
    file.flush()


def _with_patience(address: str, attempt: Callable[[], T]) -> T:
    """The result of the first attempt that is no failure of the network. Raises DataError."""
    for number in range(ATTEMPTS):
        if number:
            time.sleep(_PAUSE_SECONDS * 2 ** (number - 1))
        try:
            return attempt()
        except HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 429):
                break
        except _FAULTS as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
    raise DataError(
        f"{shown(address)} cannot be fetched ({reason}); check the address and the network, or copy the data"
        " here and set data.root to its folder"
    )


def _open(address: str) -> BinaryIO:
    opener = OpenerDirector()
    # By hand: the library's own opener also opens files and ftp, which a server could redirect to.
    for handler in (
        ProxyHandler,
        HTTPHandler,
        HTTPSHandler,
        HTTPRedirectHandler,
        HTTPErrorProcessor,
        HTTPDefaultErrorHandler,
        UnknownHandler,
    ):
        opener.add_handler(handler())
    request = Request(address, headers={"User-Agent": "taming-toolkit"})
    answer: BinaryIO = opener.open(request, timeout=TIMEOUT_SECONDS)
    return answer
