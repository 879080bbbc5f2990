"""The safetensors files of a checkpoint: writes a rank's boxes to one, and reads a box of any."""

import json
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from triplane.checkpoint.errors import CheckpointError, DamagedError
from triplane.checkpoint.manifest import Box
from triplane.data.files import sync
from triplane.parallel.placement import Fragment

_CHUNK_BYTES = 2**20
"""Small enough to be in the cache still when its checksum is computed."""


def write_tensors(path: Path, fragments: Sequence[Fragment]) -> list[Box]:
    """Puts the fragments on the disk; returns what is where. Without fragments there is no file."""
    if not fragments:
        return []
    arrays = {_entry(fragment.key, fragment.offsets): fragment.data.cpu().numpy() for fragment in fragments}
    try:
        save_file(arrays, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # else the owner's alone
    with ThreadPoolExecutor(1) as thread:  # the disk and this core work at the same time
        on_disk = thread.submit(sync, path)
        checksums = [zlib.crc32(array.data) for array in arrays.values()]
        on_disk.result()
    return [
        Box(fragment.key, tuple(fragment.shape), fragment.offsets, tuple(fragment.data.shape), path.name, checksum)
        for fragment, checksum in zip(fragments, checksums)
    ]


class TensorFile:
    """A file of boxes. Read without a memory map, under which a failing disk would be a signal and not an error."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > path.stat().st_size:
                    raise ValueError(f"a header of {length} bytes")
                self._entries = json.loads(file.read(length))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        self._start = 8 + length

    def read(self, box: Box, into: Tensor) -> None:
        """Fills `into`, which has the box's sizes, and verifies what it reads."""
        target = into.numpy().data.cast("B")
        checksum = 0
        try:
            entry = self._entries[_entry(box.key, box.offsets)]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != "F32" or entry["shape"] != list(box.sizes) or end - begin != len(target):
                raise ValueError(f"{entry} for {box.key} of {list(box.sizes)}")
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start + begin)
                while target:
                    chunk = target[: file.readinto(target[:_CHUNK_BYTES])]
                    if not chunk:
                        raise ValueError(f"ends within {box.key}")
                    checksum = zlib.crc32(chunk, checksum)
                    target = target[len(chunk) :]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise _unreadable(self.path, error) from error
        if checksum != box.crc32:
            raise DamagedError(
                f"{self.path}: {box.key} is damaged (CRC-32 {checksum:08x}, written as {box.crc32:08x}); take another "
                f"checkpoint"
            )


def _entry(key: str, offsets: Sequence[int]) -> str:
    """A box's name within the file."""
    return f"{key}@{','.join(map(str, offsets))}"


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path}: {error}; make it readable")
    return DamagedError(f"{path}: unreadable ({error}); take another checkpoint")
