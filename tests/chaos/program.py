"""Strikes runs with faults of all kinds, drawn from a seed."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random

from chaos.faults import FAULTS
from chaos.trial import Recovery, Trial
from small_corpora import Prepared

_PER_RUN = 8
"""Faults that strike one run, at most."""
_DISK_BYTES = 64 * 2**20


def chaos(prepared: Prepared, folder: Path, seed: int, faults: int) -> Iterator[list[Recovery]]:
    """Yields the faults that a run has survived, run after run; the first is the one that never changes its layout.

    Raises AssertionError at the first broken promise, and then leaves its run in `folder`.
    """
    with _small_disk(folder / "disk") as disk:
        kinds = _kinds(seed, full_disks=disk is not None)
        for number, start in enumerate(range(0, faults, _PER_RUN)):
            struck = list(islice(kinds, min(_PER_RUN, faults - start)))
            run = folder / f"run_{number}"
            run.mkdir()
            yield Trial(prepared, run, seed + number, struck, number % 4 == 0, disk).run()
            shutil.rmtree(run)
            for path in disk.iterdir() if disk else ():
                shutil.rmtree(path)


def _kinds(seed: int, full_disks: bool) -> Iterator[str]:
    """Without end; each comes once before any comes again."""
    draw = Random(seed)
    kinds = [kind for kind, fault in FAULTS.items() if full_disks or not fault.small_disk]
    while True:
        draw.shuffle(kinds)
        yield from kinds


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """None where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)
