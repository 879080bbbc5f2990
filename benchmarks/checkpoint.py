"""Saving and loading a checkpoint beside writing and reading the same bytes with nothing in between.

    python benchmarks/checkpoint.py [--mib 512] [--ranks 2] [--repeats 5] [--folder FOLDER]

Writes are on the disk (fsync), reads come from it (the page cache is dropped). The state is on the host. The stall is
how long training stands still for a save in the background: until it is begun, and after the products of the next
step's forward and backward pass until the weights may change. Where these products take all cores, as here, the thread
that copies and writes slows them down; that is told too.
"""

import argparse
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from triplane.checkpoint.config import CheckpointConfig
from triplane.checkpoint.reader import Checkpoint
from triplane.checkpoint.store import CheckpointStore
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.parallel.placement import Fragment
from triplane.prove.forked import run_ranks

_ROWS = 1024
_TENSORS = 64
_PRODUCTS = 50
"""In a step: about a third of a second."""


def _fragments(mesh: Mesh, mib: int) -> list[Fragment]:
    """This rank's columns of `_TENSORS` matrices, random, `mib` in all ranks together."""
    columns = mib * 2**20 // 4 // _TENSORS // _ROWS // mesh.world_size
    whole, offsets = torch.Size((_ROWS, columns * mesh.world_size)), (0, columns * mesh.rank)
    names = (f"{number}" for number in range(_TENSORS))
    return [
        Fragment(
            kind="weight",
            name=name,
            shape=whole,
            offsets=offsets,
            data=torch.rand(_ROWS, columns),
            primary=True,
        )
        for name in names
    ]


def _write(path: Path, fragments: list[Fragment]) -> None:
    with open(path, "wb", buffering=0) as file:
        for fragment in fragments:
            file.write(fragment.data.numpy().data)
        os.fsync(file.fileno())


def _read(path: Path, fragments: list[Fragment]) -> None:
    with open(path, "rb", buffering=0) as file:
        for fragment in fragments:
            file.readinto(fragment.data.numpy().data)


def _drop_from_cache(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _timed(action: Callable[[], object]) -> float:
    """Seconds until all ranks are done."""
    dist.barrier()
    start_s = perf_counter()
    action()
    dist.barrier()
    return perf_counter() - start_s


def _step() -> None:
    """Stands for a forward and backward pass."""
    matrix = torch.ones(1024, 1024)
    for _ in range(_PRODUCTS):
        matrix @ matrix


def _state(step: int) -> dict[str, Any]:
    return {"step": step, "consumed_sequences": 0, "tokens_seen": 0, "run": {}}


def _step_beside_a_save(store: CheckpointStore, step: int, fragments: list[Fragment]) -> None:
    store.save(step, fragments, _state(step))
    _step()
    store.wait_until_copied()


def measure(mesh: Mesh, folder: Path, mib: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each kind of transfer, taken in turns."""
    torch.manual_seed(mesh.rank)
    fragments = _fragments(mesh, mib)
    stores = {
        asynchronous: CheckpointStore(
            folder / str(asynchronous), CheckpointConfig(asynchronous=asynchronous, keep_last=1)
        )
        for asynchronous in (False, True)
    }
    raw = folder / "raw"
    raw.mkdir(exist_ok=True)
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in range(1, repeats + 2):
        path = raw / str(mesh.rank)
        path.unlink(missing_ok=True)
        taken, saves = {}, {}
        order = [None, *stores]
        for kind in order[step % 3 :] + order[: step % 3]:  # a disk takes the first write faster than the third
            if kind is None:
                taken["raw write"] = _timed(lambda path=path: _write(path, fragments))
                continue
            stores[kind].save(2 * step, fragments, _state(2 * step))
            (saves[kind],) = stores[kind].ended(wait=True)
            assert saves[kind].error is None, saves[kind].error
            dist.barrier()
        sync, asynchronous = saves[False], saves[True]
        taken |= {"save": sync.time_s, "save in the background": asynchronous.time_s}
        taken["step"] = _timed(_step)
        taken["step beside a save"] = _timed(partial(_step_beside_a_save, stores[True], 2 * step + 1, fragments))
        (beside,) = stores[True].ended(wait=True)
        taken["stall"] = beside.stall_s
        for written in (raw, sync.path):
            _drop_from_cache(written)
        dist.barrier()
        taken["raw read"] = _timed(lambda path=path: _read(path, fragments))
        taken["load"] = _timed(lambda sync=sync: Checkpoint(sync.path).fill(fragments))
        for name, taken_s in taken.items() if step > 1 else ():  # the first one warms up
            seconds[name].append(taken_s)
    return seconds


def main() -> None:
    """Prints a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        seconds, *_ = run_ranks(
            ParallelConfig(), args.ranks, measure, Path(folder), args.mib, args.repeats, timeout_s=3600
        )
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.mib} MiB over {args.ranks} ranks, median of {args.repeats}")
    for name, median_s in medians.items():
        print(f"{name:24} {median_s:8.3f} s {args.mib / 1024 / median_s:8.2f} GiB/s")
    print(f"save at {medians['raw write'] / medians['save']:.0%} of the raw write")
    print(f"load at {medians['raw read'] / medians['load']:.0%} of the raw read")
    print(f"stall {medians['stall'] / medians['save']:.1%} of a save that training waits for")
    slower_s = statistics.median(b - a for a, b in zip(seconds["step"], seconds["step beside a save"]))
    print(f"a step beside a save is {slower_s:.3f} s longer, {slower_s / medians['save']:.0%} of such a save")


if __name__ == "__main__":
    main()
