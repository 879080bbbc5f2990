"""Runs a function on forked ranks: forking costs a second where a fresh start costs ten."""

import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import connected

_FORK = multiprocessing.get_context("fork")
_TIMEOUT_S = 60


def run_ranks(layout: ParallelConfig, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(mesh, *args)` on every rank of the layout; returns what each returned, by rank."""
    with TemporaryDirectory() as folder:
        queue: Any = _FORK.Queue()
        ranks = [
            _FORK.Process(target=_rank, args=(queue, layout, rank, world_size, Path(folder), function, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            answers = [pickle.loads(queue.get(timeout=_TIMEOUT_S)) for _ in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.join()
    errors = [f"rank {rank}:\n{error}" for rank, error, _ in answers if error]
    assert not errors, "\n".join(errors)
    return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]


def _rank(
    queue: Any,
    layout: ParallelConfig,
    rank: int,
    world_size: int,
    folder: Path,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world_size)
    answer = (rank, traceback.format_exc(), None)
    try:
        with connected(layout, torch.device("cpu"), rank, world_size, store) as mesh:
            answer = (rank, "", function(mesh, *args))
    except BaseException:
        answer = (rank, traceback.format_exc(), None)
    # Plain bytes: a tensor in a queue is a file descriptor that dies with its process.
    queue.put(pickle.dumps(answer))
    queue.close()
    queue.join_thread()
    sys.stdout.flush()
    # gloo's threads abort now and then in an ordinary exit.
    os._exit(0)
