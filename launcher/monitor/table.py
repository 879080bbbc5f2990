"""Prints a table of words."""

import math
import shutil
import sys
from collections.abc import Sequence
from itertools import accumulate

_GAP = "  "


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints the columns that fit on the terminal, all of them elsewhere."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    ends = accumulate(width + len(_GAP) for width in widths)
    room = shutil.get_terminal_size().columns + len(_GAP) if sys.stdout.isatty() else math.inf
    shown = max(1, sum(end <= room for end in ends))
    for row in rows:
        print(_GAP.join(word.ljust(width) for word, width in zip(row[:shown], widths)).rstrip())
