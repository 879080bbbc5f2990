"""Finds the trackers and callbacks that `tracking` names, and adds up what they measure."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from triplane.storage.errors import ConfigError
from triplane.training.callback import Callback, Sums

if TYPE_CHECKING:
    from triplane.model.batch import Batch
    from triplane.parallel.engine import Engine

GROUP = "triplane.callbacks"
"""The entry points by which a package offers callbacks."""
USERS = "user/"
"""What the names of their metrics begin with."""
_OURS = {"wandb": "triplane.training.trackers:Wandb", "trackio": "triplane.training.trackers:Trackio"}


def tracking_problems(names: Sequence[str]) -> Iterator[str]:
    """Yields why these cannot be called; imports them."""
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"tracking: {name} is given {names.count(name)} times; give it once"
        try:
            yield from (f"tracking: {name}: {problem}" for problem in _load(name).problems())
        except ConfigError as error:
            yield str(error)


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """Returns a callback for each name; raises ConfigError."""
    return [_load(name) for name in names]


def measured(callbacks: Sequence[Callback], batches: "Sequence[Batch]", engine: "Engine") -> dict[str, float]:
    """Returns the metrics that the callbacks measure, by `user/NAME`; collective."""
    sums: dict[str, Sums] = {}
    for callback in callbacks:
        own = callback.measure(batches, engine.evaluate)
        if twice := sorted(sums.keys() & own.keys()):
            raise ConfigError(
                f"tracking: {type(callback).__name__}: another callback measures {twice[0]} too; rename it"
            )
        sums |= own
    if not sums:
        return {}
    import torch
    import torch.distributed as dist

    names = sorted(sums)  # each rank may have them in an order of its own
    pairs = [(float(numerator), float(denominator)) for numerator, denominator in map(sums.__getitem__, names)]
    totals = torch.tensor(pairs, dtype=torch.float64, device=engine.mesh.device)
    dist.all_reduce(totals, group=engine.mesh.dp.group)
    return {f"{USERS}{name}": over / under for name, (over, under) in zip(names, totals.tolist()) if under}


def _load(name: str) -> Callback:
    entry = _find(name)
    try:
        callback = entry.load()()
    except Exception as error:  # in code that is not ours, anything may happen
        own = f"; put its file into {os.getcwd()}, or install it" if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"tracking: {name} cannot be loaded: {type(error).__name__}: {error}{own}") from error
    if not isinstance(callback, Callback):
        raise ConfigError(f"tracking: {name}: {entry.value} is not a subclass of triplane.training.callback.Callback")
    return callback


def _find(name: str) -> EntryPoint:
    if name in _OURS:
        return EntryPoint(name, _OURS[name], GROUP)
    installed = entry_points(group=GROUP)
    if name in installed.names:
        return installed[name]
    if not re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", name):
        known = ", ".join([*_OURS, *sorted(installed.names)])
        raise ConfigError(f"tracking: {name} is unknown; give {known}, or module:Class")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    return EntryPoint(name, name, GROUP)
