"""Prepares standard input, output and error, which a caller may have closed or opened with another encoding."""

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from triplane.storage.errors import StorageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def prepare_streams() -> None:
    """Opens what is closed, as files would take the numbers of the streams; escapes what an encoding lacks."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            opened = os.open(os.devnull, os.O_RDWR)
            assert opened == number, "the lowest free number"
            os.set_inheritable(opened, True)  # a child without it would give the number to its first file
            setattr(sys, name, os.fdopen(opened, "w" if number else "r"))
        elif number and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if stream is sys.__stdout__:
                sys.stdout = _told_if_full(stream)


def _told_if_full(stdout: io.TextIOWrapper) -> io.TextIOWrapper:
    """Returns standard output anew, with a user's mistake as the error if the disk is full."""
    raw = _Output(stdout.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        raw if stdout.write_through else io.BufferedWriter(raw),
        encoding=stdout.encoding,
        errors=stdout.errors,
        line_buffering=stdout.line_buffering,
        write_through=stdout.write_through,
    )


class _OutputFullError(StorageError, OSError):
    """A mistake to who reads it, and an OSError to who writes on without the output."""


class _Output(io.FileIO):
    def write(self, content: "ReadableBuffer", /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise _OutputFullError(
                f"standard output cannot be written: {error.strerror}; write it elsewhere"
            ) from error


def copy_errors(log: Path) -> None:
    """Writes what goes to standard error into `log` as well, as it comes."""
    sys.stderr = _Copied(sys.stderr, log.open("a", buffering=1, errors="backslashreplace"))


class _Copied(io.TextIOBase):
    def __init__(self, stream: TextIO, copy: TextIO):
        self._stream, self._copy = stream, copy

    def write(self, text: str, /) -> int:
        with suppress(OSError):  # a full disk; the stream itself has the text
            self._copy.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()
