"""Finds ranks with intermittent memory or arithmetic errors: a step computed twice gives two different states."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils import deterministic

from triplane.parallel.engine import Engine
from triplane.storage.errors import TrainingError
from triplane.training.replicas import checksum, ranks_where

# cuBLAS reads this once, when CUDA starts, and its products are deterministic only with it; torch insists on it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def repeated(engine: Engine, step: int) -> Iterator[None]:
    """Has optimizer step `step` computed twice from the same state: `for _ in repeated(...)` around it. Collective.

    Raises TrainingError with the mismatching ranks if a bit of the state differs. Keeps a copy of the rank's share of
    the state.
    """
    fragments = list(engine.fragments())
    before = [fragment.data.clone() for fragment in fragments]
    with _deterministic():
        yield
        first = checksum([fragment.data for fragment in fragments], engine.mesh.device)
        for fragment, data in zip(fragments, before):
            fragment.data.copy_(data)
        engine.optimizer.loaded(step - 1)
        yield
    second = checksum([fragment.data for fragment in fragments], engine.mesh.device)
    if ranks := ranks_where(engine.mesh, bool(first != second)):
        raise TrainingError(
            f"step {step}: computed twice, it gave two different states on ranks {ranks}; exclude the faulty node, "
            f"then start again from the last checkpoint"
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Allows only deterministic kernels; an operation without one raises.

    If torch only warned, flash attention would add up gradients in any order, and healthy GPUs would differ.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # filling costs a pass over each new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
