"""Reads and writes the index of a shard: where each token and document is, and checksums."""

import io
import itertools
import tarfile
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from triplane.storage.errors import printable
from triplane.storage.files import write_whole

_CHUNK_BYTES = 1 << 20
_ENTRY_BYTES = 3 * 8 + 4 + 4
"""Index size per document, if each has its own block."""
_HEADER_BYTES = 1 << 16
_KINDS = {"extents": "<i8", "offsets": "<i8", "tokens": "<i8", "crc32": "<u4", "lengths": "<u4"}


class ShardIndex(NamedTuple):
    """Locations in a tar of N blocks and D documents."""

    extents: NDArray[np.int64]
    """(N + 1,) block i, with headers and padding, spans bytes `extents[i]` to `extents[i + 1]`."""
    offsets: NDArray[np.int64]
    """(N,) byte of each block's first token."""
    tokens: NDArray[np.int64]
    """(N,) tokens in each block."""
    crc32: NDArray[np.uint32]
    """(N,) checksum of each block's extent."""
    lengths: NDArray[np.uint32]
    """(D,) tokens in each document."""

    @classmethod
    def load(cls, file: Path | BinaryIO, documents: int | None = None) -> "ShardIndex":
        """Reads what `save` wrote; raises ValueError for other content, or more than `documents` could take."""
        try:
            with zipfile.ZipFile(file) as archive:
                if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in cls._fields):
                    raise ValueError(f"the arrays {printable(', '.join(archive.namelist())[:200])}")
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("compressed arrays, whose size the file's does not bound")
                unpacked = sum(member.file_size for member in archive.infolist())
                if documents is not None and unpacked > (most := _ENTRY_BYTES * (documents + 1) + _HEADER_BYTES):
                    raise ValueError(
                        f"{unpacked:,} bytes unpacked, where {documents:,} documents take at most {most:,}"
                    )
                return cls(*(_array(archive, name) for name in cls._fields))
        except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"not an index: {error}") from error
        except MemoryError as error:
            raise ValueError("an array that does not fit into memory") from error

    def check(self, size_bytes: int, tokens: int, documents: int, itemsize: int) -> None:
        """Raises ValueError if this cannot index a tar of `size_bytes` with so many tokens and documents."""
        blocks = len(self.tokens)
        shapes = [len(self.extents) - 1, len(self.offsets), len(self.crc32)]
        if blocks == 0 or shapes != [blocks] * 3 or len(self.lengths) != documents:
            raise ValueError(f"{shapes} extents, offsets and checksums of {blocks} blocks, {len(self.lengths)} lengths")
        for name, array, least, most in (
            ("extents", self.extents, 0, size_bytes),
            ("offsets", self.offsets, 0, size_bytes),
            ("tokens", self.tokens, 1, tokens),
            ("lengths", self.lengths, 1, tokens),
        ):
            if array.min() < least or array.max() > most:
                raise ValueError(f"{name} from {array.min()} to {array.max()}, not from {least} to {most}")
        ends = self.offsets + self.tokens * itemsize
        if not ((self.extents[:-1] <= self.offsets) & (ends <= self.extents[1:])).all():
            raise ValueError("tokens outside their block")
        bounds, starts = np.cumsum(self.tokens), np.cumsum(self.lengths, dtype=np.int64)
        if bounds[-1] != tokens or starts[-1] != tokens or not np.isin(bounds, starts).all():
            raise ValueError(
                f"{bounds[-1]:,} tokens in blocks and {starts[-1]:,} in documents, which must be {tokens:,}"
            )

    def save(self, path: Path) -> None:
        """Writes an `.npz`, whose bytes depend on the index alone."""
        buffer = io.BytesIO()
        np.savez(buffer, **self._asdict())
        write_whole(path, buffer.getvalue())


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Reads a one-dimensional array no larger than the archive, whatever shape its header claims."""
    with archive.open(f"{name}.npy") as file:
        content = io.BytesIO(file.read())
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name}: another version of the array format")
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"{name}: invalid array header") from error
    left = len(content.getbuffer()) - content.tell()
    if dtype != np.dtype(_KINDS[name]) or len(shape) != 1 or shape[0] * dtype.itemsize != left:
        raise ValueError(f"{name}: {dtype} of shape {shape} in {left:,} bytes")
    return np.frombuffer(content.getbuffer(), dtype, offset=content.tell())


def index_shard(path: Path) -> ShardIndex:
    """Builds the index of a tar from its content on the disk."""
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
        extents=np.array(extents),
        offsets=np.array(offsets),
        tokens=np.array(counts),
        crc32=np.array(crc32, np.uint32),
        lengths=np.concatenate(lengths),
    )


def _crc32(file: BinaryIO, size: int) -> int:
    found = 0
    while size > 0:
        chunk = file.read(min(size, _CHUNK_BYTES))
        found = zlib.crc32(chunk, found)
        size -= len(chunk)
    return found
