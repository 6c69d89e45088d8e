"""Errors that a user can mend. Each message names what was given, what is allowed and the way out.

The command line prints them as one line, without a traceback, and exits with code 2.
"""


class UserError(ValueError):
    """Something that the user gave cannot be used."""


class ConfigError(UserError):
    """A config file or an override is wrong."""


class DataError(UserError):
    """A picture, a map or a folder of them cannot be used."""


class ArtifactError(UserError):
    """A saved model or a checkpoint cannot be used."""
