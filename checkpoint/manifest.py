"""What a checkpoint says of itself: global tensors by name, where each of their boxes lies, and the run's state.

    step_100/manifest.json      written last: no manifest, no checkpoint
    step_100/rank_0.safetensors one file for each rank that had something to write
    damaged_step_90/            was found damaged when a run resumed

How many ranks wrote it is not part of its meaning.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from triplane.checkpoint.errors import CheckpointError, DamagedError
from triplane.data.files import sync

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step_"
"""Of the folder's name, before the step."""
_DAMAGED = "damaged_"
"""Of the folder's name, before the prefix, once it was set aside."""


@dataclass(frozen=True)
class Box:
    """A part of a global tensor in a file."""

    key: str
    shape: tuple[int, ...]
    """Of the global tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    crc32: int
    """Of the box's bytes."""


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`."""

    state: dict[str, Any]
    """The run's progress and identity; the training room owns the keys."""
    boxes: list[Box]
    file_bytes: dict[str, int]

    def to_json(self) -> str:
        body = {"format": FORMAT, "state": self.state, "file_bytes": self.file_bytes}
        text = json.dumps(body | {"boxes": [asdict(box) for box in self.boxes]})
        return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text})


def read_manifest(folder: Path) -> Manifest:
    """Reads and verifies a manifest; the files beside it must have the sizes that it says."""
    path = folder / MANIFEST
    if not path.exists():
        raise DamagedError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint; take another")
    try:
        outer = json.loads(path.read_text())
        text = outer["body"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("checksum differs")
        body = json.loads(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: damaged ({error}); take another checkpoint") from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, but this version of triplane reads {FORMAT}")
    for name, expected in body["file_bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != expected:
            found_text = "missing" if found is None else f"{found} bytes"
            raise DamagedError(f"{folder / name}: {found_text}, expected {expected} bytes; take another checkpoint")
    boxes = [
        Box(b["key"], tuple(b["shape"]), tuple(b["offsets"]), tuple(b["sizes"]), b["file"], b["crc32"])
        for b in body["boxes"]
    ]
    return Manifest(body["state"], boxes, body["file_bytes"])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Puts the manifest on the disk, beside files that are there already."""
    with open(folder / MANIFEST, "w") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written, by its name."""
    return int(checkpoint.name.rpartition(PREFIX)[2])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, whole or damaged, oldest first."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.name[len(PREFIX) :].isdecimal()), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest checkpoint under `folder`, whole or damaged."""
    found = checkpoints(folder)
    return found[-1] if found else None


def newest_manifest(folder: Path) -> tuple[Path, Manifest] | None:
    """The newest checkpoint under `folder` whose manifest, and files' sizes, are as they were written."""
    for path in reversed(checkpoints(folder)):
        try:
            return path, read_manifest(path)
        except DamagedError:
            continue  # the ranks name it and set it aside
    return None


def set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, which is never deleted, so that no run takes it; returns its new path."""
    suffixes = ("" if number == 1 else f".{number}" for number in count(1))
    names = (checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}{suffix}") for suffix in suffixes)
    aside = next(path for path in names if not path.exists())
    checkpoint.rename(aside)
    sync(checkpoint.parent)
    return aside


def fresh_start_problem(folder: Path) -> str | None:
    """Why a run that finds no whole checkpoint under `folder` may not begin anew: there are damaged ones."""
    damaged = [*folder.glob(f"{_DAMAGED}{PREFIX}*"), *checkpoints(folder)]
    if not damaged:
        return None
    return (
        f"{folder}: {', '.join(sorted(path.name for path in damaged))}: no checkpoint is whole; restore one from a "
        f"copy, or let the run begin anew by --allow-fresh-start"
    )
