"""Which cores of this machine each of its ranks computes on."""

import os
import sys
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def cores_of_ranks(count: int) -> list[set[int]]:
    """As many for each of `count` ranks, and whole ones: the threads of a core go to one rank.

    Empty sets if there are fewer cores than ranks, or where processes cannot be bound: on macOS, or where a container
    hides which threads share a core.
    """
    if sys.platform != "linux":
        return [set()] * count
    try:
        cores = sorted(os.sched_getaffinity(0), key=_place)
    except (OSError, ValueError) as error:
        print(f"triplane: ranks are not bound to cores, since {_TOPOLOGY} does not tell: {error}", file=sys.stderr)
        return [set()] * count
    each = len(cores) // count
    return [set(cores[rank * each : (rank + 1) * each]) for rank in range(count)]


def _place(core: int) -> tuple[int, int, int]:
    """Socket and physical core: threads of one core are not always numbered side by side."""
    topology = _TOPOLOGY / f"cpu{core}/topology"
    socket, physical = (int((topology / name).read_text()) for name in ("physical_package_id", "core_id"))
    return socket, physical, core
