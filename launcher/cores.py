"""Assigns the cores of this machine to its ranks."""

import os
import sys
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def cores_of_ranks(count: int) -> list[set[int]]:
    """Returns equally many cores for each of `count` ranks, and all threads of a physical core to the same one.

    The sets are empty if there are fewer cores than ranks, or if processes cannot be bound: on macOS, or in a container
    that hides which threads share a core.
    """
    if sys.platform != "linux":
        return [set()] * count
    try:
        cores = sorted(os.sched_getaffinity(0), key=_place)
    except (OSError, ValueError) as error:
        print(f"triplane: ranks are not bound to cores, since {_TOPOLOGY} cannot be read: {error}", file=sys.stderr)
        return [set()] * count
    each = len(cores) // count
    return [set(cores[rank * each : (rank + 1) * each]) for rank in range(count)]


def _place(core: int) -> tuple[int, int, int]:
    """Returns a sort key by socket and physical core, since sibling threads are not always numbered consecutively."""
    topology = _TOPOLOGY / f"cpu{core}/topology"
    socket, physical = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    return socket, physical, core
