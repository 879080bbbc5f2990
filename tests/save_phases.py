"""The phases of a save, and how a process is made to die in one."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from triplane.checkpoint import folder, store, tensors
from triplane.checkpoint.manifest import Manifest

Armed = Callable[[], bool]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(action: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    def act(*arguments: Any, **options: Any) -> Any:
        if armed():
            die()
        return action(*arguments, **options)

    return act


def _after(action: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    def act(*arguments: Any, **options: Any) -> Any:
        result = action(*arguments, **options)
        if armed():
            die()
        return result

    return act


def _half_a_file(writing: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    @contextmanager
    def act(path: Path) -> Iterator[BinaryIO]:
        with writing(path) as file:
            if armed():
                file.write(bytes(1000))
                file.flush()
                die()
            yield file

    return act


def _half_a_folder(rmtree: Callable[..., Any], armed: Armed) -> Callable[..., Any]:
    def act(path: Path, *arguments: Any, **options: Any) -> Any:
        if Path(path).suffix == ".old" and armed():
            sorted(Path(path).iterdir())[0].unlink()
            die()
        return rmtree(path, *arguments, **options)

    return act


PHASES: dict[str, tuple[int, Any, str, Any]] = {
    "before the folder": (0, store, "begin", _before),
    "in a file": (1, tensors, "writing", _half_a_file),
    "before a file is on the disk": (1, os, "fsync", _before),
    "before the manifest": (0, Manifest, "to_json", _before),
    "after the manifest": (0, folder, "write_manifest", _after),
    "before the rename": (0, Path, "rename", _before),
    "after the rename": (0, store, "commit", _after),
    "in the deletion of an old one": (0, shutil, "rmtree", _half_a_folder),
}
"""The rank of two that dies, and what is replaced by what."""
REMOTE_PHASES: dict[str, tuple[int, Any, str, Any]] = {
    "before the first file": (0, store, "begin", _before),
    "before a file": (1, store, "write_tensors", _before),
    "before the manifest": (0, folder, "write_manifest", _before),
    "after the manifest": (0, store, "commit", _after),
    "in the deletion of an old one": (0, folder, "remove", _before),
}
"""The same, of a save at a URL."""


def plant(phase: str, armed: Armed, phases: dict[str, tuple[int, Any, str, Any]] = PHASES) -> None:
    """From now on this process is killed in `phase` of a save if `armed` says so then."""
    _, owner, name, how = phases[phase]
    setattr(owner, name, how(getattr(owner, name), armed))
