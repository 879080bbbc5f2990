"""Assigns a device to each rank of this machine, and checks that the layout can run on it."""

import os
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from triplane.parallel.config import ParallelConfig
from triplane.parallel.environment import whole_number
from triplane.parallel.ranks import Rank
from triplane.parallel.rules import Devices, device_problems


def use_cpu() -> None:
    """Hides the GPUs from this process and its children; call it before torch looks for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def visible_devices() -> Devices:
    """Returns the GPUs that this process sees, or a CPU."""
    from torch import cuda  # 2 s to import

    count = cuda.device_count() if cuda.is_available() else 0
    return Devices(count, cuda.get_device_capability(0) if count else None)


def problems_of_devices(
    layout: ParallelConfig, precision: str, devices: Devices, *, rank: Rank | None, ranks: int
) -> Iterator[str]:
    """Yields why this machine's `devices` cannot run one of its ranks, or the layout.

    `rank` is None in the launcher of `ranks` local ranks.
    """
    here = ranks if rank is None else rank.local_size
    first = Rank(rank=0, world_size=ranks, local_rank=0, local_size=ranks)
    if devices.gpus and gpu_number(rank or first, devices.gpus) is None:
        seen = "one GPU is" if devices.gpus == 1 else f"{devices.gpus} GPUs are"
        yield (
            f"{here} ranks on this machine{'' if rank is None else f', this one number {rank.local_rank}'}, but {seen} "
            f"visible; start fewer (parallel.dp=1 leaves one copy of the model), or train on the CPU with --device cpu"
        )
    if layout.compile and (missing := missing_to_compile(on_gpu=devices.gpus > 0)):
        yield f"parallel.compile requires {missing}, which is not here; install it, or set parallel.compile=false"
    yield from device_problems(layout, precision, devices)


def missing_to_compile(*, on_gpu: bool) -> str | None:
    """Returns what torch.compile lacks on this machine: it writes C++ for a CPU, and C that calls a GPU."""
    variable, names = ("CC", ("gcc", "clang")) if on_gpu else ("CXX", ("g++",))
    chosen = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((chosen,) if chosen else names)):
        return f"the compiler {variable}={chosen}" if chosen else f"a compiler ({' or '.join(names)})"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        return f"Python's headers ({headers})"
    torch = find_spec("torch")
    if not on_gpu and torch is not None and torch.origin is not None and " " in torch.origin:
        return f"torch in a path without spaces ({torch.origin}), to which it links its C++"
    return None


def gpu_number(rank: Rank, visible: int) -> int | None:
    """Returns the number of the rank's GPU among the visible ones; None if there is none for it.

    Where Slurm shows each task only its own GPU, that is number 0.
    """
    if rank.shown_apart and visible == 1:
        return 0
    return rank.local_rank if max(rank.local_rank + 1, rank.local_size) <= visible else None


def threads(environment: Mapping[str, str]) -> int | None:
    """Returns OMP_NUM_THREADS; of a list, one number per level of nesting, the first."""
    given = environment.get("OMP_NUM_THREADS")
    if not given:
        return None
    return whole_number({"OMP_NUM_THREADS": given.split(",")[0]}, "OMP_NUM_THREADS", least=1)
