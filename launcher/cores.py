"""Which cores of this machine each of its ranks computes on."""

import os
import sys
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def cores_of_ranks(count: int) -> list[set[int]]:
    """As many for each of `count` ranks, and whole ones: the threads of a core go to one rank.

    Empty sets if there are fewer cores than ranks, or where processes cannot be bound (macOS).
    """
    if sys.platform != "linux":
        return [set()] * count
    cores = sorted(os.sched_getaffinity(0), key=_place)
    each = len(cores) // count
    return [set(cores[rank * each : (rank + 1) * each]) for rank in range(count)]


def _place(core: int) -> tuple[int, int, int]:
    """Socket and physical core: threads of one core are not always numbered side by side."""
    topology = _TOPOLOGY / f"cpu{core}/topology"
    socket, physical = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    return socket, physical, core
