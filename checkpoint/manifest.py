"""Reads and writes manifests: global tensors by name, where each of their boxes lies, and the run's state.

    step_100/manifest.json       written last: no manifest, no checkpoint
    step_100/rank_0.safetensors  one file per rank that had something to write

A reader need not know how many ranks wrote it.
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from triplane.storage.errors import CheckpointError, DamagedError
from triplane.storage.foreign import FileName, Name, first_problem
from triplane.storage.location import Location, entries, read, writing

FORMAT = 1
MANIFEST = "manifest.json"

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Dims = Annotated[tuple[_Count, ...], Field(max_length=8)]
_Span = Annotated[list[_Count], Field(min_length=2, max_length=2)]
_ELEMENT_BYTES = 4
"""Every saved tensor is fp32."""


@dataclass(frozen=True)
class Box:
    """A part of a global tensor in a file."""

    key: Name
    shape: _Dims
    """Shape of the global tensor."""
    offsets: _Dims
    sizes: _Dims
    file: FileName
    crc32: Annotated[int, Field(ge=0, lt=2**32)]
    """Checksum of the box's bytes."""


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


class _Progress(BaseModel, strict=True, extra="allow"):
    """The run's progress, and any further keys of a newer version."""

    step: _Count
    consumed_sequences: _Count
    tokens_seen: _Count
    skipped: list[_Span] = []
    recent: list[Annotated[list[float], Field(min_length=2, max_length=2)]] = []
    unlogged: tuple[float, _Count, float] = (0.0, 0, 0.0)
    validation_loss: float | None = None
    mean_of: list[_Count] = []
    """The steps of which the weights are the mean; none: those of `step`."""
    run: dict[str, Any]


class _Outer(BaseModel, strict=True):
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    body: str


class _Format(BaseModel, strict=True):
    format: int


class _Body(BaseModel, strict=True, extra="forbid"):
    """The text under the checksum, which only protects it from accidental change."""

    format: int
    state: _Progress
    file_bytes: dict[FileName, _Count]
    boxes: list[Box]


def read_manifest(folder: Location) -> Manifest:
    """Reads and verifies a manifest; the files beside it must have the listed sizes, and room for its boxes."""
    path = folder / MANIFEST
    found = entries(folder)
    if MANIFEST not in found:
        raise DamagedError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint; take another")
    try:
        outer = _Outer.model_validate_json(read(path))
        if hashlib.sha256(outer.body.encode()).hexdigest() != outer.sha256:
            raise ValueError("checksum differs")
        version = _Format.model_validate_json(outer.body).format
        if version != FORMAT:
            raise CheckpointError(f"{path}: format {version}, but this version of triplane reads {FORMAT}")
        body = _Body.model_validate_json(outer.body)
        _check_room(body)
    except ValidationError as error:
        raise DamagedError(f"{path}: damaged ({first_problem(error)}); take another checkpoint") from error
    except (CheckpointError, OSError):
        raise
    except (ValueError, MemoryError) as error:
        raise DamagedError(f"{path}: damaged ({error}); take another checkpoint") from error
    for name, expected in body.file_bytes.items():
        if found.get(name) != expected:
            found_text = f"{found[name]} bytes" if found.get(name, -1) >= 0 else "missing"
            raise DamagedError(f"{folder / name}: {found_text}, expected {expected} bytes; take another checkpoint")
    return Manifest(body.state.model_dump(exclude_unset=True), body.boxes, body.file_bytes)


def _check_room(body: _Body) -> None:
    """Raises ValueError unless every box is in a listed file, and no file is too small for its boxes."""
    needed: dict[str, int] = defaultdict(int)
    for box in body.boxes:
        if not len(box.shape) == len(box.offsets) == len(box.sizes):
            raise ValueError(f"{box.key}: a box of {len(box.sizes)} dims in a tensor of {len(box.shape)}")
        needed[box.file] += math.prod(box.sizes) * _ELEMENT_BYTES
    for name, size in needed.items():
        if size > body.file_bytes.get(name, -1):
            raise ValueError(f"{name}: has {body.file_bytes.get(name, 'no')} bytes, but boxes of {size}")


def write_manifest(folder: Location, manifest: Manifest) -> None:
    """Writes the manifest beside the files that it lists."""
    with writing(folder / MANIFEST) as file:
        file.write(manifest.to_json().encode())
