"""Finds ranks whose memory or arithmetic errs from one moment to the next: a step done twice gives two states."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch.utils import deterministic

from triplane.parallel.engine import Engine
from triplane.training.replicas import checksum, ranks_where

T = TypeVar("T")

# cuBLAS reads it once, when CUDA starts. Products are the same twice only with it, and torch refuses others.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def twice(engine: Engine, step: int, update: Callable[[], T]) -> tuple[T, list[int]]:
    """Does `update`, which is optimizer step `step`, twice from the same state; collective.

    Returns what the second returned, and the ranks whose state then differed in a bit: all that took up an error.
    Holds the rank's share of the state once more.
    """
    fragments = list(engine.optimizer.fragments())
    before = [fragment.data.clone() for fragment in fragments]
    with _deterministic():
        update()
        first = checksum([fragment.data for fragment in fragments], engine.mesh.device)
        for fragment, data in zip(fragments, before):
            fragment.data.copy_(data)
        engine.optimizer.loaded(step - 1)
        result = update()
    second = checksum([fragment.data for fragment in fragments], engine.mesh.device)
    return result, ranks_where(engine.mesh, bool(first != second))


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
