"""Exit codes of `triplane`; README.md lists them. A process that a signal ended has 128 and the signal's number."""

import os
import sys
from enum import IntEnum
from typing import NoReturn


class Exit(IntEnum):
    """What a caller may decide by."""

    OK = 0
    FAILED = 1
    """A crash, or a check that failed: `plan` found a problem, `prove` a difference."""
    MISTAKE = 2
    """What the user asked cannot be done; trying again changes nothing."""
    BAD_NODE = 3
    """`check-nodes` found a node out of line."""
    TRY_AGAIN = os.EX_TEMPFAIL
    """75: a rank hung, or the run folder is held by another process."""


def leave(code: int) -> NoReturn:
    """Ends the process now: gloo's threads abort one exit in twelve after a run that finished right."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
