"""What a checkpoint says of itself: global tensors by name, where each of their boxes lies, and the run's state.

    step_100/manifest.json      written last: no manifest, no checkpoint
    step_100/rank_0.safetensors one file for each rank that had something to write

How many ranks wrote it is not part of its meaning.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triplane.checkpoint.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
PREFIX = "step_"
"""Of the folder's name, before the step."""


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

    @property
    def entry(self) -> str:
        """Its name within the file."""
        return f"{self.key}@{','.join(map(str, self.offsets))}"


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
        raise CheckpointError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint")
    try:
        outer = json.loads(path.read_text())
        text = outer["body"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("checksum differs")
        body = json.loads(text)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); resume from another checkpoint") from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, but this version of triplane reads {FORMAT}")
    for name, expected in body["file_bytes"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != expected:
            found_text = "missing" if found is None else f"{found} bytes"
            raise CheckpointError(
                f"{folder / name}: {found_text}, expected {expected} bytes; resume from another checkpoint"
            )
    boxes = [
        Box(b["key"], tuple(b["shape"]), tuple(b["offsets"]), tuple(b["sizes"]), b["file"], b["crc32"])
        for b in body["boxes"]
    ]
    return Manifest(body["state"], boxes, body["file_bytes"])


def finished(folder: Path) -> list[Path]:
    """The finished checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / MANIFEST).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint under `folder`."""
    checkpoints = finished(folder)
    return checkpoints[-1] if checkpoints else None
