"""Finds ranks whose memory or arithmetic errs from one moment to the next: a step done twice gives two states."""

from collections.abc import Callable
from typing import TypeVar

import torch

from triplane.parallel.engine import Engine
from triplane.training.replicas import checksum, ranks_where

T = TypeVar("T")


def twice(engine: Engine, step: int, update: Callable[[], T]) -> tuple[T, list[int]]:
    """Does `update`, which is optimizer step `step`, twice from the same state; collective.

    Returns what the second returned, and the ranks whose state then differed in a bit: all that took up an error. On a
    GPU both use torch's deterministic kernels. Holds the rank's share of the state once more.
    """
    fragments = list(engine.optimizer.fragments())
    before = [fragment.data.clone() for fragment in fragments]
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        update()
        first = checksum([fragment.data for fragment in fragments], engine.mesh.device)
        for fragment, data in zip(fragments, before):
            fragment.data.copy_(data)
        engine.optimizer.loaded(step - 1)
        result = update()
    finally:
        torch.use_deterministic_algorithms(deterministic)
    second = checksum([fragment.data for fragment in fragments], engine.mesh.device)
    return result, ranks_where(engine.mesh, bool(first != second))
