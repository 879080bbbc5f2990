"""Writes a rank's boxes to a safetensors file, and reads boxes from such files."""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor

from triplane.checkpoint.manifest import Box
from triplane.parallel.placement import Fragment
from triplane.storage.errors import CheckpointError, DamagedError, OutOfReachError, printable
from triplane.storage.foreign import first_problem, regular_file
from triplane.storage.location import Location, fill, writing

_LENGTH_BYTES = 8
"""The header's length, little-endian, comes before it."""
_MOST_HEADER_BYTES = 100_000_000
"""The safetensors library's limit."""


def write_tensors(path: Location, fragments: Sequence[Fragment]) -> tuple[list[Box], int]:
    """Writes the fragments; returns their boxes and the file's size. Without fragments writes no file."""
    if not fragments:
        return [], 0
    arrays = [fragment.data.cpu().numpy() for fragment in fragments]
    header, end = {}, 0
    for fragment, array in zip(fragments, arrays):
        span = [end, end := end + array.nbytes]
        entry = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}
        header[_entry_name(fragment.key, fragment.offsets)] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    with ThreadPoolExecutor(1) as thread, writing(path) as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for array in arrays:
            file.write(array.data.cast("B"))
        # This core computes checksums while the end of the block waits for the disk.
        checksums = thread.map(lambda array: zlib.crc32(array.data), arrays)
    boxes = [
        Box(
            key=fragment.key,
            shape=tuple(fragment.shape),
            offsets=fragment.offsets,
            sizes=tuple(fragment.data.shape),
            file=path.name,
            crc32=checksum,
        )
        for fragment, checksum in zip(fragments, checksums)
    ]
    return boxes, _LENGTH_BYTES + len(text) + end


class _Entry(BaseModel, strict=True):
    dtype: Literal["F32"]
    shape: list[int]
    data_offsets: tuple[int, int]


_Header = TypeAdapter(dict[str, _Entry])


class TensorFile:
    """A file of boxes, opened for reading. Raises DamagedError if its header is invalid."""

    def __init__(self, path: Location, size_bytes: int):
        self.path = path
        try:
            if isinstance(path, Path):
                regular_file(path)
            length = int.from_bytes(self._read(0, _LENGTH_BYTES), "little")
            self._start = _LENGTH_BYTES + length
            if self._start > size_bytes or length > _MOST_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes in a file of {size_bytes}")
            self._entries = _Header.validate_json(self._read(_LENGTH_BYTES, length))
        except ValidationError as error:
            raise self._unreadable(first_problem(error)) from error
        except (OSError, ValueError, MemoryError) as error:
            raise self._unreadable(error) from error
        self._data_bytes = size_bytes - self._start

    def check_listed(self, boxes: Sequence[Box]) -> None:
        """Raises DamagedError if the file holds a box that is not among `boxes`, all that the manifest has of it."""
        unlisted = self._entries.keys() - {_entry_name(box.key, box.offsets) for box in boxes}
        if unlisted:
            raise self._unreadable(f"the manifest lists no {printable(min(unlisted))}")

    def read(self, box: Box, into: Tensor) -> None:
        """Fills `into`, which has the box's sizes, and verifies the bytes."""
        target = into.numpy().data.cast("B") if into.numel() else memoryview(b"")
        entry = self._entries.get(_entry_name(box.key, box.offsets))
        if entry is None:
            raise self._unreadable(f"no {box.key} of offsets {list(box.offsets)}")
        begin, end = entry.data_offsets
        if entry.shape != list(box.sizes) or end - begin != len(target) or not 0 <= begin <= end <= self._data_bytes:
            raise self._unreadable(f"{box.key}: bytes {begin} to {end} of {self._data_bytes}, for {list(box.sizes)}")
        checksum = 0
        missing = len(target)
        try:
            for part in fill(self.path, self._start + begin, target):
                checksum = zlib.crc32(part, checksum)
                missing -= len(part)
        except OSError as error:
            raise self._unreadable(error) from error
        if missing:
            raise self._unreadable(f"ends within {box.key}")
        if checksum != box.crc32:
            raise DamagedError(
                f"{self.path}: {box.key} is damaged (CRC-32 {checksum:08x}, written as {box.crc32:08x}); take another "
                f"checkpoint"
            )

    def _read(self, begin: int, size: int) -> bytes:
        buffer = bytearray(size)
        found = sum(map(len, fill(self.path, begin, memoryview(buffer))))
        return bytes(buffer[:found])

    def _unreadable(self, error: Exception | str) -> CheckpointError:
        if isinstance(error, PermissionError):
            return CheckpointError(f"{self.path}: {error}; make it readable")
        if isinstance(error, OutOfReachError):
            return error
        return DamagedError(f"{self.path}: unreadable ({error}); take another checkpoint")


def _entry_name(key: str, offsets: Sequence[int]) -> str:
    """Returns a box's name within the file."""
    return f"{key}@{','.join(map(str, offsets))}"
