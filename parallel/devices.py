"""Which device each rank of this machine takes, and what a layout asks of it."""

import os
from collections.abc import Iterator, Mapping

from triplane.parallel.config import ParallelConfig
from triplane.parallel.environment import whole_number
from triplane.parallel.ranks import Rank
from triplane.parallel.rules import Devices, device_problems


def use_cpu() -> None:
    """Hides the GPUs from this process and those that it starts; before torch looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def visible_devices() -> Devices:
    """The GPUs that this process sees, or a CPU."""
    from torch import cuda  # 2 s to import

    count = cuda.device_count() if cuda.is_available() else 0
    return Devices(count, cuda.get_device_capability(0) if count else None)


def problems_of_devices(
    layout: ParallelConfig, precision: str, rank: Rank | None, ranks: int, devices: Devices
) -> Iterator[str]:
    """What cannot run on this machine's `devices`: one of its ranks, or the layout.

    `rank` is None in the launcher of `ranks` local ones.
    """
    here = ranks if rank is None else rank.local_size
    if devices.gpus and gpu_number(rank or Rank(0, ranks, 0, ranks), devices.gpus) is None:
        seen = "one GPU is" if devices.gpus == 1 else f"{devices.gpus} GPUs are"
        yield (
            f"{here} ranks on this machine{'' if rank is None else f', this one number {rank.local_rank}'}, but {seen} "
            f"visible; start fewer (parallel.dp=1 leaves one copy of the "
            f"model), or train on the CPU by --device cpu"
        )
    yield from device_problems(layout, precision, devices)


def gpu_number(rank: Rank, visible: int) -> int | None:
    """The GPU that a rank takes of those that it sees; None if there is none for it.

    Where Slurm shows each task a GPU of its own, all are number 0.
    """
    if rank.shown_apart and visible == 1:
        return 0
    return rank.local_rank if max(rank.local_rank + 1, rank.local_size) <= visible else None


def threads(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS, which may list a number for each level of nesting; the first counts here."""
    given = environment.get("OMP_NUM_THREADS")
    if not given:
        return None
    return whole_number({"OMP_NUM_THREADS": given.split(",")[0]}, "OMP_NUM_THREADS", least=1)
