"""Tells a user's mistakes from bugs and crashes."""

import errno
import os
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
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and _output_is_full():
        return f"standard output cannot be written: {error.strerror}; write it elsewhere"
    return None


def _output_is_full() -> bool:
    """Tries to write a line: streams forget what they could not write."""
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False
