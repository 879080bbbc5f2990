"""Restores a run's state from its newest whole checkpoint, setting damaged ones aside."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from triplane.checkpoint.folder import latest, set_aside, step_of
from triplane.checkpoint.reader import Checkpoint
from triplane.parallel.placement import Fragment
from triplane.parallel.rank_0 import on_rank_0
from triplane.storage.errors import CheckpointError, DamagedError
from triplane.storage.location import Location


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes from."""

    path: Location
    state: dict[str, Any]


@dataclass(frozen=True)
class Damage:
    """A damaged checkpoint that was set aside."""

    step: int
    path: Location
    """Its new place."""
    reason: str


def fill_from_newest(folder: Location, fragments: Iterable[Fragment]) -> tuple[Resumed | None, list[Damage]]:
    """Fills the fragments of all ranks from the newest whole checkpoint under `folder`; collective.

    Sets aside any checkpoint that a rank finds damaged. Without a whole checkpoint the fragments are zero. Raises
    CheckpointError on all ranks if one finds a whole checkpoint that does not fit.
    """
    fragments = list(fragments)
    damages: list[Damage] = []
    # Only rank 0 looks, since a shared file system may show the ranks different states.
    while path := on_rank_0(lambda: latest(folder)):
        resumed, error = _try(path, fragments)
        errors: list[CheckpointError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        found = [error for error in errors if error is not None]
        for error in found:
            if not isinstance(error, DamagedError):
                raise error
        if not found:
            return resumed, damages
        aside = on_rank_0(lambda path=path: set_aside(path))  # type: ignore[misc]
        damages.append(Damage(step_of(path), aside, str(found[0])))
    for fragment in fragments:
        fragment.data.zero_()
    return None, damages


def _try(path: Location, fragments: list[Fragment]) -> tuple[Resumed | None, CheckpointError | None]:
    try:
        checkpoint = Checkpoint(path)
        checkpoint.fill(fragments)
    except CheckpointError as error:
        return None, error
    return Resumed(path, checkpoint.state), None
