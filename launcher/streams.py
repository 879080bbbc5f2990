"""Prepares standard input, output and error, which a caller may have closed or opened with another encoding."""

import io
import os
import sys


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
