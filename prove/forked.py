"""Runs a function on every rank of a layout, each a child process on this machine that inherits its imports."""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from triplane.parallel.config import ParallelConfig
from triplane.parallel.groups import connected

_STACKS_S = 1.0
"""Time in which ranks write where they stand."""


class RanksFailedError(RuntimeError):
    """One or more ranks failed or gave no answer in time; the message holds their tracebacks."""


def run_ranks(
    layout: ParallelConfig,
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    device: str = "cpu",
    timeout_s: float = 60,
) -> list[Any]:
    """Runs `function(mesh, *args)` on every rank of the layout; returns the results by rank.

    Forking takes a second and spawning ten, but CUDA requires spawning, for which `function` must be importable.
    """
    context: Any = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    with TemporaryDirectory() as folder:
        queue = context.Queue()
        shared = {"world_size": world_size, "device": device, "folder": Path(folder)}
        ranks = [
            context.Process(
                target=_rank, args=(queue, function, args), kwargs={"layout": layout, "rank": rank} | shared
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            answers = [pickle.loads(_next(queue, ranks, timeout_s)) for _ in ranks]
        except Empty:
            raise RanksFailedError(f"no answer in {timeout_s:g} s\n{_stacks(Path(folder), ranks)}") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
    errors = [f"rank {rank}:\n{error}" for rank, error, _ in answers if error]
    if errors:
        raise RanksFailedError("\n".join(errors))
    return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]


def _next(answers: Any, ranks: list[Any], timeout_s: float) -> bytes:
    """Returns the next answer; raises RanksFailedError if a rank was killed, Empty on timeout."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        killed = [
            f"rank {rank}: exit code {process.exitcode}" for rank, process in enumerate(ranks) if process.exitcode
        ]
        try:
            return answers.get(timeout=0.1)
        except Empty:
            if killed:
                raise RanksFailedError("\n".join(killed)) from None
    raise Empty


def _stacks(folder: Path, ranks: list[Any]) -> str:
    """Returns where the ranks that still run stand."""
    files = {rank: folder / f"stack-{rank}" for rank, process in enumerate(ranks) if process.is_alive()}
    for rank in files:
        os.kill(ranks[rank].pid, signal.SIGUSR2)
    time.sleep(_STACKS_S)
    return "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files.items() if file.exists())


def _rank(
    queue: Any,
    function: Callable[..., Any],
    args: Any,
    *,
    layout: ParallelConfig,
    rank: int,
    world_size: int,
    device: str,
    folder: Path,
) -> None:
    stacks = (folder / f"stack-{rank}").open("w")
    faulthandler.register(signal.SIGUSR2, file=stacks)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers default to TF32, which is less exact than fp32
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(where)
    elif layout.compile:
        from torch._inductor import config

        config.compile_threads = 1  # the parent's, which it would wait for, do not survive a fork
    try:
        with connected(
            layout, where, rank=rank, world_size=world_size, store=FileStore(str(folder / "store"), world_size)
        ) as mesh:
            answer = (rank, "", function(mesh, *args))
    except BaseException:  # the parent raises it, whatever it is
        answer = (rank, traceback.format_exc(), None)
    # Sent as plain bytes, since a tensor in a queue is a file descriptor that dies with its process.
    queue.put(pickle.dumps(answer))
    queue.close()
    queue.join_thread()
    sys.stdout.flush()
    # gloo's threads sometimes abort in an ordinary exit.
    os._exit(0)
