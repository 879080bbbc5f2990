"""The index of a shard: where each token and document is, and the checksums that prove it."""

import io
import itertools
import tarfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triplane.data.files import write_whole

_CHUNK_BYTES = 1 << 20


class ShardIndex(NamedTuple):
    """Where things are in a tar of N blocks and D documents."""

    extents: NDArray[np.int64]
    """(N + 1,) block i, headers and padding too, is the bytes `extents[i]` to `extents[i + 1]`."""
    offsets: NDArray[np.int64]
    """(N,) byte of each block's first token."""
    tokens: NDArray[np.int64]
    """(N,) tokens in each block."""
    crc32: NDArray[np.uint32]
    """(N,) checksum of each block's extent."""
    lengths: NDArray[np.uint32]
    """(D,) tokens in each document."""

    @classmethod
    def load(cls, file: Path | BinaryIO) -> "ShardIndex":
        """Reads what `save` wrote."""
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**arrays)

    def save(self, path: Path) -> None:
        """Writes an `.npz`; the same index gives the same bytes."""
        buffer = io.BytesIO()
        np.savez(buffer, **self._asdict())
        write_whole(path, buffer.getvalue())


def index_shard(path: Path) -> ShardIndex:
    """Reads the index off a tar as it is on the disk."""
    extents, offsets, counts, lengths = [], [], [], []
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            file.seek(member.offset_data)
            if member.name.endswith(".len.npy"):
                extents.append(member.offset)
                lengths.append(np.load(file, allow_pickle=False))
            else:
                assert np.lib.format.read_magic(file) == (1, 0)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
                offsets.append(file.tell())
                counts.append(shape[0])
        extents.append(tar.offset)
        file.seek(extents[0])
        crc32 = [_crc32(file, end - start) for start, end in itertools.pairwise(extents)]
    return ShardIndex(
        np.array(extents), np.array(offsets), np.array(counts), np.array(crc32, np.uint32), np.concatenate(lengths)
    )


def _crc32(file: BinaryIO, size: int) -> int:
    """Of the next `size` bytes."""
    found = 0
    while size > 0:
        chunk = file.read(min(size, _CHUNK_BYTES))
        found = zlib.crc32(chunk, found)
        size -= len(chunk)
    return found
