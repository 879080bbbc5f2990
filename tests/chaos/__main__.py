"""`make chaos`: a long chaos test, and a table of what was survived."""

import argparse
import sys
import time
from pathlib import Path
from random import randrange
from statistics import median
from tempfile import mkdtemp

from chaos.program import chaos
from chaos.trial import Recovery
from rich.console import Console
from rich.table import Table
from small_corpora import build_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", type=int)
    parser.add_argument("--seed", type=int, default=randrange(2**32))
    options = parser.parse_args()
    folder = Path(mkdtemp(prefix="triplane-chaos-"))
    (folder / "corpus").mkdir()
    prepared = build_corpus(folder / "corpus")
    console, survived, begun_s = Console(), [], time.monotonic()
    try:
        for recoveries in chaos(prepared, folder, options.seed, options.faults):
            survived += recoveries
            console.print(f"{len(survived)} of {options.faults} faults, {time.monotonic() - begun_s:.0f} s")
    except AssertionError as error:
        console.print(_table(survived))
        print(f"{error}\nbroken by: make chaos N={options.faults} SEED={options.seed}; its files: {folder}")
        return 1
    console.print(_table(survived))
    console.print(f"seed {options.seed}")
    return 0


def _table(survived: list[Recovery]) -> Table:
    table = Table("fault", "struck and survived", "recovery, median", "worst")
    for kind in sorted({recovery.kind for recovery in survived}):
        seconds = [recovery.seconds for recovery in survived if recovery.kind == kind]
        table.add_row(kind, str(len(seconds)), f"{median(seconds):.1f} s", f"{max(seconds):.1f} s")
    return table


if __name__ == "__main__":
    sys.exit(main())
