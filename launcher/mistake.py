"""Tells a user's mistakes from bugs and crashes."""

import sys

import typer

from triplane.storage.errors import TriplaneError


def mistake_of(error: Exception) -> str | None:
    """Returns the problems that a user can fix, one per line; None if the error is a bug or a crash."""
    if isinstance(error, TriplaneError):
        return str(error)
    if isinstance(error, typer.TyperException):
        message = error.format_message()  # empty if the full help was shown
        return message and f"{message.rstrip('.')}; see --help"
    # A rank that loses a file has crashed, and may be restarted.
    if isinstance(error, OSError) and error.filename is not None and sys.argv[1:2] != ["train"]:
        return f"{error.filename}: {error.strerror}"
    return None
