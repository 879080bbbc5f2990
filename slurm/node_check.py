"""`triplane check-nodes`: measures the nodes of a job before it trains, and reports outliers."""

import hashlib
import math
import os
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import triplane
from triplane.parallel.devices import gpu_number
from triplane.parallel.ranks import Rank, current_rank, rendezvous
from triplane.storage.errors import LaunchError
from triplane.training.exits import Exit

_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")
_LEAST_DISK_GIB = 1.0
_LEAST_SHARED_MEMORY_GIB = 0.125
"""Docker's default of 64 MiB is too little for the loader's workers."""
_MOST_SKEW_S = 1.0
_LEAST_BANDWIDTH = 0.5
"""Lowest bandwidth of a sound node, as a share of the median."""
_MOST_USED, _MOST_USED_GIB = 0.05, 2.0
"""GPU memory that may be in use, whichever is more; this check's own context and NCCL's buffers take up to 2 GiB."""
_ROUNDS = 8
"""Number of partners each node is measured with."""
_REPEATS = 3
_TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True)
class Facts:
    """Facts that a rank collects on its node."""

    node: str
    local_rank: int
    code: str
    """Digest of triplane's sources, and versions of its packages."""
    clock_s: float
    """The node's clock, read by all ranks within a few milliseconds."""
    disk_gib: float
    """Free space on the disk of the run folder."""
    temporary_gib: float
    shared_memory_gib: float
    device: str
    device_gib: float
    """Memory of the device; 0 for a CPU."""
    device_used_gib: float
    bandwidth_gib_s: float
    """Median bandwidth of all-reduces with the same local rank on other nodes; infinite with one node."""


def check_nodes(run_dir: Path, bad_nodes: Path | None) -> int:
    """Runs on every rank of a step; rank 0 prints a table and appends the names of faulty nodes to `bad_nodes`."""
    rank = current_rank(os.environ)
    if rank is None:
        raise LaunchError("check-nodes runs as one of several ranks: start it with srun or torchrun")
    if not run_dir.is_dir():
        raise LaunchError(f"{run_dir}: no such folder; give the run folder, or the folder that will contain it")
    os.environ.update(rendezvous(os.environ))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        number = gpu_number(rank, torch.cuda.device_count())
        if number is None:
            raise LaunchError(
                f"{rank.local_size} ranks on this node, but {torch.cuda.device_count()} GPUs; start one for each GPU"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=rank.rank, world_size=rank.world_size, timeout=_TIMEOUT)
    mine = _facts(run_dir, rank, device)
    facts: list[Facts | None] | None = [None] * rank.world_size if rank.rank == 0 else None
    dist.gather_object(mine, facts)
    bad: list[dict[str, list[str]]] = [{}]
    if facts:
        bad[0] = faulty_nodes([fact for fact in facts if fact])
        print("\n".join(_table([fact for fact in facts if fact], bad[0])), flush=True)
        if bad[0] and bad_nodes:
            with bad_nodes.open("a") as lines:
                lines.writelines(f"{node}\n" for node in bad[0])
    dist.broadcast_object_list(bad)
    dist.destroy_process_group()
    return Exit.BAD_NODE if bad[0] else Exit.OK


def faulty_nodes(facts: list[Facts]) -> dict[str, list[str]]:
    """Returns the problems of each node that a run should not train on."""
    code = _commonest(fact.code for fact in facts)
    device = _commonest(fact.device for fact in facts)
    clock_s = median(fact.clock_s for fact in facts)
    speeds = _speeds(facts)
    found: dict[str, dict[str, None]] = {}  # each problem once, in order
    for fact in facts:
        problems = [*_problems(fact, code=code, device=device, clock_s=clock_s), *_slow(fact.node, speeds)]
        if problems:
            found[fact.node] = found.get(fact.node, {}) | dict.fromkeys(problems)
    return {node: list(problems) for node, problems in found.items()}


def _speeds(facts: list[Facts]) -> dict[str, float]:
    """Returns the GiB/s of each node, the median of its ranks."""
    nodes = dict.fromkeys(fact.node for fact in facts)
    return {node: median(fact.bandwidth_gib_s for fact in facts if fact.node == node) for node in nodes}


def _slow(node: str, speeds: dict[str, float]) -> Iterator[str]:
    typical = median(speeds.values())
    # With two nodes, a slow link between them could be the fault of either.
    if len(speeds) > 2 and speeds[node] < _LEAST_BANDWIDTH * typical:
        yield f"all-reduce at {speeds[node]:.3g} GiB/s, others at {typical:.3g}"


def _commonest(values: Iterable[str]) -> str:
    return Counter(values).most_common(1)[0][0]


def _problems(fact: Facts, *, code: str, device: str, clock_s: float) -> Iterator[str]:
    if fact.device != device:
        yield f"has {fact.device}, others have {device}"
    if fact.code != code:
        yield f"runs {fact.code}, others run {code}"
    if abs(fact.clock_s - clock_s) > _MOST_SKEW_S:
        yield f"clock is off by {fact.clock_s - clock_s:+.1f} s"
    for what, free, least in (
        ("run folder", fact.disk_gib, _LEAST_DISK_GIB),
        (tempfile.gettempdir(), fact.temporary_gib, _LEAST_DISK_GIB),
        ("/dev/shm", fact.shared_memory_gib, _LEAST_SHARED_MEMORY_GIB),
    ):
        if free < least:
            yield f"{what}: {free:.3f} GiB free, less than {least}"
    if fact.device_used_gib > max(_MOST_USED_GIB, _MOST_USED * fact.device_gib):
        used = f"{fact.device_used_gib:.1f} of {fact.device_gib:.1f} GiB"
        yield f"{fact.device} {fact.local_rank} is in use: {used}"


def _facts(run_dir: Path, rank: Rank, device: torch.device) -> Facts:
    dist.barrier()
    clock_s = time.time()
    gib = 2**30
    name, used_bytes, all_bytes = "CPU", 0, 0
    if device.type == "cuda":
        free_bytes, all_bytes = torch.cuda.mem_get_info(device)
        name, used_bytes = torch.cuda.get_device_name(device), all_bytes - free_bytes
    return Facts(
        node=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        local_rank=rank.local_rank,
        code=_code(),
        clock_s=clock_s,
        disk_gib=shutil.disk_usage(run_dir).free / gib,
        temporary_gib=shutil.disk_usage(tempfile.gettempdir()).free / gib,
        shared_memory_gib=shutil.disk_usage("/dev/shm").free / gib,
        device=name,
        device_gib=all_bytes / gib,
        device_used_gib=used_bytes / gib,
        bandwidth_gib_s=_bandwidth_gib_s(rank, device),
    )


def _code() -> str:
    digest = hashlib.sha256()
    package = Path(triplane.__file__).parent
    for path in sorted(package.glob("*/**/*.py")):
        digest.update(path.read_bytes())
    return " ".join([f"triplane {digest.hexdigest()[:8]}", *(f"{name} {version(name)}" for name in _PACKAGES)])


def _bandwidth_gib_s(rank: Rank, device: torch.device) -> float:
    nodes, mine = rank.world_size // rank.local_size, rank.rank // rank.local_size
    measured = []
    for pairs in _rounds(nodes):
        dist.barrier()
        for pair in pairs:
            if mine in pair and len(set(pair)) == 2:
                measured.append(_pair_gib_s([node * rank.local_size + rank.local_rank for node in pair], device))
    dist.barrier()
    return median(measured) if measured else float("inf")


def _rounds(nodes: int) -> Iterable[list[tuple[int, int]]]:
    """Yields the pairs of each round of a round-robin tournament, which measure at the same time."""
    places = nodes + nodes % 2  # with an odd number of nodes, one waits in each round
    for turn in range(min(places - 1, _ROUNDS)):
        order = [0, *((turn + place) % (places - 1) + 1 for place in range(places - 1))]
        pairs = zip(order[: places // 2], reversed(order[places // 2 :]))
        yield [(min(pair), max(pair)) for pair in pairs if max(pair) < nodes]


def _pair_gib_s(ranks: list[int], device: torch.device) -> float:
    group = dist.new_group(ranks, use_local_synchronization=True)
    payload = torch.ones((64 if device.type == "cuda" else 4) * 2**18, device=device)  # MiB of fp32
    times_s = []
    for _ in range(1 + _REPEATS):
        start_s = time.perf_counter()
        dist.all_reduce(payload, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    dist.destroy_process_group(group)
    return payload.nbytes / 2**30 / min(times_s[1:])


def _table(facts: list[Facts], bad: dict[str, list[str]]) -> Iterator[str]:
    clock_s = median(fact.clock_s for fact in facts)
    yield f"{'node':12} {'ranks':>5} {'all-reduce':>12} {'clock':>9} {'/dev/shm':>10} {'run folder':>11}  device"
    for node, speed in _speeds(facts).items():
        ranks = [fact for fact in facts if fact.node == node]
        first = ranks[0]
        bandwidth = f"{speed:.3g} GiB/s" if math.isfinite(speed) else "one node"
        yield (
            f"{node:12} {len(ranks):5} {bandwidth:>12} {first.clock_s - clock_s:+7.3f} s "
            f"{first.shared_memory_gib:6.3g} GiB {first.disk_gib:7.4g} GiB  {first.device}"
            f"{''.join(f'; {problem}' for problem in bad.get(node, []))}"
        )
    yield f"faulty nodes: {', '.join(bad)}" if bad else "no faulty nodes"
