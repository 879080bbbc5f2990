"""Runs an action on rank 0 with the same outcome on all ranks."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import ProcessGroup

T = TypeVar("T")


def on_rank_0(action: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Returns on all ranks of `group` what `action` returns on rank 0; raises its OSError or ValueError on all."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])
