"""Trouble that passes: a disk or a network drive that does not answer at once is asked again."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from taming.errors import BadSample

T = TypeVar("T")

PAUSES_SECONDS = (0.1, 0.5, 2.0)
TRANSIENT = frozenset(
    (
        errno.EIO,
        errno.ESTALE,  # a network drive whose server restarted
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.EREMOTEIO,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENOTCONN,  # a mount whose helper died and is started again
    )
)


def patiently(read: Callable[[], T]) -> T:
    """What `read` gives; a BadSample that comes of trouble that may pass is tried three times more."""
    for pause in PAUSES_SECONDS:
        try:
            return read()
        except BadSample as error:
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return read()


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or what it was made of, is one of the system that may not come again."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in TRANSIENT or isinstance(error, TimeoutError)):
            return True
        error = error.__cause__ or error.__context__
    return False
