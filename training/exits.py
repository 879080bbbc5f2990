"""Exit codes of `triplane`, listed in README.md. A process ended by a signal exits with 128 + the signal's number."""

import os
import sys
from contextlib import suppress
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """Outcomes that callers can distinguish."""

    OK = 0
    FAILED = 1
    """A crash, or a check that failed: `plan` found a problem, `prove` a difference."""
    MISTAKE = 2
    """The request is invalid; trying again does not help."""
    BAD_NODE = 3
    """`check-nodes` found an outlier."""
    TRY_AGAIN = os.EX_TEMPFAIL
    """75: a rank hung, or the run folder is held by another process."""


def leave(code: int) -> NoReturn:
    """Exits without cleanup: gloo's threads abort one regular exit in twelve after a successful run."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk, or a reader that has gone
            stream.flush()
    os._exit(code)
