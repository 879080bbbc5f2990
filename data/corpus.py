"""Random access to the tokens of one split, memory-mapped and checked."""

import mmap
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from triplane.data.index import ShardIndex
from triplane.data.manifest import Manifest, Shard, Tokens, damaged


class Corpus:
    """The tokens of a split as one sequence, in stored order.

    Opening checks that every file is there in its full size; the checksum of a block is checked when it is first
    read. Nothing damaged is ever skipped: DataError says where it is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.load(folder)
        for shard in self.manifest.shards:
            shard.data.check_size(folder)
            shard.index.check_size(folder)
        self.digest = self.manifest.digest
        self.tokens = self.manifest.tokens
        self.documents = self.manifest.documents
        self.vocab_size = self.manifest.vocab_size
        self.tokenizer_digest = self.manifest.tokenizer_digest
        self._starts = _starts([shard.tokens for shard in self.manifest.shards])
        self._open: dict[int, _OpenShard] = {}

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        # Another process maps the files itself.
        return Corpus, (self.folder,)

    def read(self, start: int, count: int) -> tuple[Tokens, NDArray[np.int64]]:
        """Tokens `start` to `start + count`, and the offsets in (0, count) at which a document starts."""
        assert start >= 0 and count > 0 and start + count <= self.tokens, (start, count, self.tokens)
        tokens = np.empty(count, self.manifest.dtype)
        boundaries: list[NDArray[np.int64]] = []
        number = int(self._starts.searchsorted(start, "right")) - 1
        filled = 0
        while filled < count:
            shard = self._shard(number)
            local = start + filled - int(self._starts[number])
            end = min(local + count - filled, shard.size)
            shard.read(local, tokens[filled : filled + end - local])
            # The first token that is read is no boundary; the first of a further shard is one.
            first, last = shard.document_starts.searchsorted((local + (filled == 0), end))
            boundaries.append(shard.document_starts[first:last] - local + filled)
            filled += end - local
            number += 1
        return tokens, np.concatenate(boundaries)

    def document_lengths(self) -> NDArray[np.uint32]:
        """Tokens of each document, (documents,), in stored order."""
        return np.concatenate([_load_index(self.folder, shard).lengths for shard in self.manifest.shards])

    def verify(self) -> None:
        """Reads every byte; raises DataError at the first file that is not what was written."""
        for shard in self.manifest.shards:
            shard.data.check_content(self.folder)
            shard.index.check_content(self.folder)

    def _shard(self, number: int) -> "_OpenShard":
        if number not in self._open:
            self._open[number] = _OpenShard(self.folder, self.manifest.shards[number], self.manifest.dtype)
        return self._open[number]


class _OpenShard:
    """A mapped tar and its index."""

    def __init__(self, folder: Path, shard: Shard, dtype: np.dtype[np.unsignedinteger]):
        self._path = folder / shard.data.name
        self._dtype = dtype
        with open(self._path, "rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._index = _load_index(folder, shard)
        self._block_starts = _starts(self._index.tokens)
        self._verified = np.zeros(len(self._index.tokens), bool)
        self.size = shard.tokens
        self.document_starts = _starts(self._index.lengths)[:-1]

    def read(self, start: int, out: Tokens) -> None:
        """Fills `out` with the tokens from `start` on."""
        block = int(self._block_starts.searchsorted(start, "right")) - 1
        filled = 0
        while filled < len(out):
            if not self._verified[block]:
                self._verify(block)
            skipped = start + filled - int(self._block_starts[block])
            count = min(len(out) - filled, int(self._index.tokens[block]) - skipped)
            offset = int(self._index.offsets[block]) + skipped * self._dtype.itemsize
            out[filled : filled + count] = np.frombuffer(self._content, self._dtype, count, offset)
            filled += count
            block += 1

    def _verify(self, block: int) -> None:
        start, end = self._index.extents[block : block + 2]
        with memoryview(self._content) as view:
            found = zlib.crc32(view[start:end])
        if found != (expected := self._index.crc32[block]):
            where = f"{self._path}: bytes {start} to {end}"
            raise damaged(where, f"CRC32 {expected:08x}", f"{found:08x}")
        self._verified[block] = True


def _load_index(folder: Path, shard: Shard) -> ShardIndex:
    shard.index.check_content(folder)
    return ShardIndex.load(folder / shard.index.name)


def _starts(sizes: NDArray[np.integer] | list[int]) -> NDArray[np.int64]:
    """(N + 1,) where each of N parts starts, and where the last one ends."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
