"""Finds ranks whose memory or arithmetic errs from one moment to the next: a step done twice gives two states."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from triplane.parallel.engine import Engine
from triplane.storage.errors import TrainingError
from triplane.training.replicas import checksum, ranks_where

# cuBLAS reads it once, when CUDA starts. Products are the same twice only with it, and torch refuses others.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def repeated(engine: Engine, step: int, update: Callable[[], object]) -> Iterator[None]:
    """Makes `update`, which is optimizer step `step`, and undoes it; the block then makes the same update. Collective.

    Raises TrainingError, which names the ranks, if the state then differs in a bit. Holds a copy of the rank's share of
    the state.
    """
    fragments = list(engine.optimizer.fragments())
    before = [fragment.data.clone() for fragment in fragments]
    with _deterministic():
        update()
        first = checksum([fragment.data for fragment in fragments], engine.mesh.device)
        for fragment, data in zip(fragments, before):
            fragment.data.copy_(data)
        engine.optimizer.loaded(step - 1)
        yield
    second = checksum([fragment.data for fragment in fragments], engine.mesh.device)
    if ranks := ranks_where(engine.mesh, bool(first != second)):
        raise TrainingError(
            f"step {step}: done twice, it gave two states on ranks {ranks}; exclude the faulty machine, then start "
            f"again from the last checkpoint"
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Only kernels that give the same bits twice; an error where there is none.

    If torch only warned, flash attention would add gradients up in any order, and healthy GPUs would differ.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it costs a pass over each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
