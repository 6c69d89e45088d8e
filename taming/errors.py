"""Errors that a user can mend. Each message names what was given, what is allowed and the way out.

The command line prints them as one line, without a traceback, and exits with their code.
"""

from typing import ClassVar


class UserError(ValueError):
    """Something that the user gave cannot be used."""

    exit_code: ClassVar[int] = 2
    everywhere: bool = False
    """Whether every process of a run raises it, so that the main one alone should say it."""


class FaultError(UserError):
    """The machine failed, not the user: a process, a worker, a device, the disk. What was saved is whole."""

    exit_code: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later


class ConfigError(UserError):
    """A config file or an override is wrong."""


class DataError(UserError):
    """A picture, a map or a folder of them cannot be used."""


REASONS = ("missing", "unreadable", "truncated", "too large", "mismatched", "checksum")
"""What can be wrong with a sample's files: gone; damaged or of another format; cut off; of more pixels than
allowed; of another kind, mode or size than the data says; other bytes than the index of its shard says."""


class BadSample(DataError):
    """The files of one sample cannot be used; others may be. `reason` is one of REASONS."""

    def __init__(self, message: str, reason: str) -> None:
        assert reason in REASONS
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class DataWarning(UserWarning):
    """Some of the data is not used: how much, and why."""


class ArtifactError(UserError):
    """A saved model or a checkpoint cannot be used."""
