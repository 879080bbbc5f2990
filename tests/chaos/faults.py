"""A table of faults: how each strikes a run, and what must follow."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from chaos.victim import Victim
from save_phases import PHASES

from triplane.checkpoint.folder import checkpoints
from triplane.checkpoint.manifest import MANIFEST
from triplane.parallel.config import ParallelConfig

_NAP_S = 7.0
"""Longer than `faults.hang_timeout_s` of a run under fire."""


@dataclass(frozen=True)
class Scene:
    """Where a fault strikes."""

    victim: Victim
    draw: Random
    layout: ParallelConfig
    """Layout of the current start, or of the next one."""


@dataclass(frozen=True)
class Fault:
    """One kind."""

    strike: Callable[[Scene], None]
    ends: int | None = None
    """The exit code with which the run ends by it; None: it goes on by itself, or is not running."""
    goes_on: str | None = "resume"
    """The event in the history with which it goes on; None: as though nothing had been."""
    leaves: dict[str, str] = field(default_factory=dict)
    """Events in the history, each with a word of its details."""
    running: bool = True
    """Whether the run is training when it strikes."""
    ranks: int = 1
    """At least."""
    workers: int = 0
    """Data workers of each rank."""
    small_disk: bool = False
    """Checkpoints are on a disk that can be filled."""


def _signal(number: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        assert scene.victim.process is not None
        scene.victim.strike(scene.victim.process.pid, by=number)

    return strike


def _every_process(number: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.victim.strike(*scene.victim.processes(), by=number)

    return strike


def _a_rank(number: int) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.victim.strike(scene.draw.choice(scene.victim.ranks()), by=number)

    return strike


def _a_worker(scene: Scene) -> None:
    scene.victim.until(scene.victim.workers, "a data worker")
    scene.victim.strike(scene.draw.choice(scene.victim.workers()))


def _stop_twice(scene: Scene) -> None:
    scene.victim.strike(scene.draw.choice(scene.victim.ranks()), by=signal.SIGSTOP)  # nobody can save now
    for _ in range(2):
        _signal(signal.SIGINT)(scene)
        time.sleep(0.3)


def _stop_file(scene: Scene) -> None:
    scene.victim.struck()
    (scene.victim.run / "stop").touch()


def _within(place: str) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        scene.victim.arm(place)
        scene.victim.until(lambda: not scene.victim.is_armed(place), place)
        scene.victim.struck()

    return strike


def _nap(scene: Scene) -> None:
    """The machine is suspended for a while."""
    processes = list(scene.victim.processes())
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(_NAP_S)
    scene.victim.strike(*processes, by=signal.SIGCONT)


def _in_the_start(scene: Scene) -> None:
    scene.victim.start(scene.layout)
    time.sleep(scene.draw.uniform(0.0, 8.0))
    scene.victim.strike(*scene.victim.processes())
    scene.victim.ended()


def _second_start(scene: Scene) -> None:
    scene.victim.struck()
    _expect("in use by another process", scene.victim.refused(scene.layout, os.EX_TEMPFAIL), scene)


def _full_disk(scene: Scene) -> None:
    ballast = scene.victim.checkpoints / "ballast"
    scene.victim.struck()
    with open(ballast, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(2**16))
    scene.victim.until(lambda: scene.victim.history("save failed", scene.victim.struck_s), "a save that fails")
    ballast.unlink()


def _shard_gone(scene: Scene) -> None:
    shard = scene.draw.choice(sorted(scene.victim.corpus.glob("train/shard-*")))
    hidden = shard.rename(scene.victim.folder / shard.name)
    scene.victim.struck()
    try:
        _expect(shard.name, scene.victim.refused(scene.layout), scene)
    finally:
        hidden.rename(shard)


def _damage(damage: Callable[[Path, Random], None]) -> Callable[[Scene], None]:
    def strike(scene: Scene) -> None:
        damage(Path(str(checkpoints(scene.victim.checkpoints)[-1])), scene.draw)
        scene.victim.struck()

    return strike


def _all_damaged(scene: Scene) -> None:
    folder, copy = scene.victim.checkpoints, scene.victim.folder / "copy"
    for path in (Path(str(found)) for found in checkpoints(folder)):
        shutil.copytree(path, copy / path.name)
        _flip(path / MANIFEST, scene.draw)
    scene.victim.struck()
    _expect("--allow-fresh-start", scene.victim.refused(scene.layout), scene)
    for path in (Path(str(found)) for found in checkpoints(folder)):
        shutil.rmtree(path)
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    shutil.rmtree(copy)


def _truncate(checkpoint: Path, draw: Random) -> None:
    path = _tensors(checkpoint, draw)
    os.truncate(path, draw.randrange(path.stat().st_size))


def _flip(path: Path, draw: Random) -> None:
    with open(path, "r+b") as file:
        at = draw.randrange(path.stat().st_size)
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def _tensors(checkpoint: Path, draw: Random) -> Path:
    return draw.choice(sorted(checkpoint.glob("*.safetensors")))


def _expect(word: str, said: str, scene: Scene) -> None:
    if len(said.splitlines()) != 1 or word not in said:
        raise scene.victim.broken(f"refused, but not in one line with {word!r}: {said!r}")


_SET_ASIDE = {"checkpoint set aside": ""}

FAULTS = {
    "SIGTERM": Fault(_signal(signal.SIGTERM), ends=0, leaves={"signal": "SIGTERM"}),
    "SIGUSR1": Fault(_signal(signal.SIGUSR1), ends=0, leaves={"signal": "SIGUSR1"}),
    "SIGINT": Fault(_signal(signal.SIGINT), ends=0, leaves={"signal": "SIG"}),  # local ranks get it as SIGTERM
    "SIGINT twice": Fault(_stop_twice, ends=130, ranks=2),
    "SIGTERM to every process": Fault(_every_process(signal.SIGTERM), ends=0, leaves={"signal": "SIGTERM"}, workers=1),
    "stop file": Fault(_stop_file, ends=0, leaves={"signal": "stop file"}),
    "SIGKILL of a rank": Fault(_a_rank(signal.SIGKILL), leaves={"failure": "SIGKILL"}, ranks=2),
    "SIGKILL of a data worker": Fault(_a_worker, leaves={"failure": "worker"}, ranks=2, workers=1),
    "SIGKILL of the launcher": Fault(_signal(signal.SIGKILL), ends=-9, leaves={"signal": "launcher gone"}, ranks=2),
    "SIGKILL of every process": Fault(_every_process(signal.SIGKILL), ends=-9),
    "SIGKILL in the start": Fault(_in_the_start, running=False),
    "SIGSTOP of a rank": Fault(_a_rank(signal.SIGSTOP), leaves={"failure": "hang"}, ranks=2),
    "suspended for a while": Fault(_nap, goes_on=None),
    "second start": Fault(_second_start, goes_on=None),
    "gradient is NaN": Fault(_within("NaN"), goes_on="rollback", leaves={"rollback": "not finite", "skip": ""}),
    "disk full": Fault(_full_disk, goes_on="save failed", leaves={"save failed": ""}, small_disk=True),
    "shard gone": Fault(_shard_gone, running=False),
    "file truncated": Fault(_damage(_truncate), leaves=_SET_ASIDE, running=False),
    "bit flipped in a file": Fault(
        _damage(lambda path, draw: _flip(_tensors(path, draw), draw)), leaves=_SET_ASIDE, running=False
    ),
    "bit flipped in the manifest": Fault(
        _damage(lambda path, draw: _flip(path / MANIFEST, draw)), leaves=_SET_ASIDE, running=False
    ),
    "manifest gone": Fault(_damage(lambda path, draw: (path / MANIFEST).unlink()), leaves=_SET_ASIDE, running=False),
    "all checkpoints damaged": Fault(_all_damaged, running=False),
    **{
        f"SIGKILL in a save: {phase}": Fault(_within(phase), leaves={"failure": "SIGKILL"}, ranks=2) for phase in PHASES
    },
}
