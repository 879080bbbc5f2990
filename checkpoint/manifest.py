"""What a checkpoint says of itself: global tensors by name, where each of their boxes lies, and the run's state.

    step_100/manifest.json       written last: no manifest, no checkpoint
    step_100/rank_0.safetensors  one file for each rank that had something to write

How many ranks wrote it is not part of its meaning.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from triplane.checkpoint.errors import CheckpointError, DamagedError
from triplane.checkpoint.location import Location, entries, read, writing

FORMAT = 1
MANIFEST = "manifest.json"


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


def read_manifest(folder: Location) -> Manifest:
    """Reads and verifies a manifest; the files beside it must have the sizes that it says."""
    path = folder / MANIFEST
    found = entries(folder)
    if MANIFEST not in found:
        raise DamagedError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint; take another")
    try:
        outer = json.loads(read(path))
        text = outer["body"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("checksum differs")
        body = json.loads(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: damaged ({error}); take another checkpoint") from error
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, but this version of triplane reads {FORMAT}")
    for name, expected in body["file_bytes"].items():
        if found.get(name) != expected:
            found_text = f"{found[name]} bytes" if name in found else "missing"
            raise DamagedError(f"{folder / name}: {found_text}, expected {expected} bytes; take another checkpoint")
    boxes = [
        Box(b["key"], tuple(b["shape"]), tuple(b["offsets"]), tuple(b["sizes"]), b["file"], b["crc32"])
        for b in body["boxes"]
    ]
    return Manifest(body["state"], boxes, body["file_bytes"])


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Puts the manifest beside files that are there already."""
    with writing(folder / MANIFEST) as file:
        file.write(manifest.to_json().encode())
