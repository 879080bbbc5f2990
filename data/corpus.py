"""Gives random access to the tokens of one split, memory-mapped and verified."""

import hashlib
import io
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triplane.data.cache import Cache
from triplane.data.folder import LocalFolder, RemoteFolder, folder_at, join
from triplane.data.index import ShardIndex
from triplane.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, StoredFile, Tokens, damaged
from triplane.data.open_tokenizer import tokenizer_of
from triplane.data.sentencepiece_tokenizer import SENTENCEPIECE_NAME
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError


class DocumentPart(NamedTuple):
    """The part of one document that a read covers."""

    shard: str
    document: int
    """Number in the shard."""
    start: int
    """First token, counted from the document's start."""
    stop: int


class Corpus:
    """The tokens of a split as one sequence, in stored order.

    Opening a folder checks that every file exists in full size. For a corpus at a URL only the manifest is fetched;
    each shard enters the `cache` with its index on first read. The checksum of a block is verified on its first read.
    Damaged data is never skipped: DataError says where it is.
    """

    def __init__(self, location: Path | str, cache: Cache | None = None):
        """`location` is a path, or an fsspec URL, which requires a cache."""
        self.location = location
        self.cache = cache
        self._folder = folder_at(location, cache)
        self.manifest = Manifest.parse(self._folder.read(MANIFEST_NAME), str(join(location, MANIFEST_NAME)))
        for shard in self.manifest.shards:
            self._folder.check_size(shard.data)
            self._folder.check_size(shard.index)
        self.digest = self.manifest.digest
        self.tokens = self.manifest.tokens
        self.documents = self.manifest.documents
        self.vocab_size = self.manifest.vocab_size
        self.tokenizer_digest = self.manifest.tokenizer_digest
        self._starts = _starts([shard.tokens for shard in self.manifest.shards])
        self._stops: list[int] = self._starts[1:].tolist()
        self._open: dict[int, _OpenShard] = {}

    @classmethod
    def open_splits(cls, location: Path | str, cache: Cache | None = None) -> tuple["Corpus", "Corpus"]:
        """Opens the training and validation splits of a prepared corpus; raises DataError if they are swapped."""
        train, validation = (cls._open_split(location, split, cache) for split in ("train", "validation"))
        return train, validation

    @classmethod
    def _open_split(cls, location: Path | str, split: Split, cache: Cache | None) -> "Corpus":
        corpus = cls(join(location, split), cache)
        if (found := corpus.manifest.split) not in (None, split):
            raise DataError(f"{corpus.location}: contains the {found} split: move each split back to its own folder")
        return corpus

    def open_tokenizer(self) -> Tokenizer:
        """Opens the tokenizer stored beside the splits; raises DataError if the corpus was made with another."""
        parent = str(self.location).rstrip("/").rpartition("/")[0] if self.is_remote else Path(self.location).parent
        names = self.manifest.tokenizer_files or (SENTENCEPIECE_NAME,)
        folder = folder_at(parent, self.cache)
        where = join(parent, names[0])
        sha256 = self.tokenizer_digest if len(names) == 1 else None  # the digest of a single file is its checksum
        tokenizer = tokenizer_of({name: folder.read(name, sha256) for name in names}, where)
        if tokenizer.digest != self.tokenizer_digest:
            raise DataError(
                f"{where}: is {tokenizer.digest[:12]}, but the corpus was tokenized with {self.tokenizer_digest[:12]}: "
                f"restore it or prepare the corpus again"
            )
        return tokenizer

    @property
    def is_remote(self) -> bool:
        """True if shards must be fetched."""
        return isinstance(self._folder, RemoteFolder)

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path | str, Cache | None]]:
        # Every process maps the files itself.
        return Corpus, (self.location, self.cache)

    def read(self, start: int, count: int) -> tuple[Tokens, NDArray[np.int64]]:
        """Reads tokens `start` to `start + count`, and the offsets in (0, count) at which a document starts."""
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
            # The first token read is not a boundary; the first token of each further shard is.
            first, last = shard.document_starts.searchsorted((local + (filled == 0), end))
            boundaries.append(shard.document_starts[first:last] - local + filled)
            filled += end - local
            number += 1
        return tokens, np.concatenate(boundaries)

    def view(self, start: int, count: int) -> Tokens:
        """Returns tokens `start` to `start + count`, read-only, without a copy if they are in one block."""
        number = bisect_right(self._stops, start)
        tokens = self._shard(number).view(start - int(self._starts[number]), count)
        return self.read(start, count)[0] if tokens is None else tokens

    def parts(self, start: int, count: int) -> Iterator[DocumentPart]:
        """Yields the parts of documents that make up tokens `start` to `start + count`."""
        while count > 0:
            number = int(self._starts.searchsorted(start, "right")) - 1
            local = start - int(self._starts[number])
            document, first, stop = self._shard(number).document_at(local)
            taken = min(count, stop - local)
            yield DocumentPart(
                shard=self.manifest.shards[number].data.name,
                document=document,
                start=local - first,
                stop=local - first + taken,
            )
            start, count = start + taken, count - taken

    def document_lengths(self) -> NDArray[np.uint32]:
        """Returns the tokens of each document, (documents,), in stored order."""
        return np.concatenate(list(self.document_lengths_by_shard()))

    def document_lengths_by_shard(self) -> Iterator[NDArray[np.uint32]]:
        """Yields for each shard the tokens of each of its documents."""
        return (_load_index(self._folder, shard, self.manifest.dtype).lengths for shard in self.manifest.shards)

    def shards_of(self, starts: NDArray[np.int64], counts: NDArray[np.int64] | int) -> list[int]:
        """Returns, ascending, the numbers of the shards touched by reads of `counts` tokens at `starts`."""
        first = self._starts.searchsorted(starts, "right") - 1
        last = self._starts.searchsorted(np.minimum(starts + counts, self.tokens) - 1, "right") - 1
        touched = np.zeros(len(self.manifest.shards) + 1, np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last + 1, -1)
        return np.flatnonzero(np.cumsum(touched)[:-1]).tolist()

    def fetch(self, number: int) -> None:
        """Makes shard `number` local if needed, and marks it as most recently used."""
        shard = self.manifest.shards[number]
        for file in (shard.index, shard.data):
            self._folder.open(file).close()

    def verify(self) -> None:
        """Reads every byte; raises DataError at the first damaged or invalid file."""
        for number, shard in enumerate(self.manifest.shards):
            for file in (shard.data, shard.index):
                with self._folder.open(file) as content:
                    _check(file, hashlib.file_digest(content, "sha256").hexdigest(), self._folder)
            self._shard(number).verify()

    def _shard(self, number: int) -> "_OpenShard":
        if number not in self._open:
            if self.is_remote:
                # The space of an evicted shard is freed only when it is unmapped.
                self._open = {other: shard for other, shard in self._open.items() if not shard.is_evicted()}
            self._open[number] = _OpenShard(self._folder, self.manifest.shards[number], self.manifest)
        return self._open[number]


class _OpenShard:
    """A mapped tar and its index."""

    def __init__(self, folder: LocalFolder | RemoteFolder, shard: Shard, manifest: Manifest):
        self._where = folder.where(shard.data)
        self._dtype = dtype = manifest.dtype
        self._vocab_size = manifest.vocab_size
        self._index = _load_index(folder, shard, dtype)
        with folder.open(shard.data) as file:
            self._path, self._inode = file.name, os.fstat(file.fileno()).st_ino
            try:
                self._content = mmap.mmap(file.fileno(), shard.data.bytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise DataError(f"{self._where}: cannot be mapped: {error}") from error
        self._block_starts = _starts(self._index.tokens)
        self._block_stops: list[int] = self._block_starts[1:].tolist()
        self._verified = np.zeros(len(self._index.tokens), bool)
        self._views: dict[int, Tokens] = {}
        self.size = shard.tokens
        self.document_starts = _starts(self._index.lengths)[:-1]

    def is_evicted(self) -> bool:
        """Returns whether the file was removed, or replaced by another copy."""
        try:
            return os.stat(self._path).st_ino != self._inode
        except FileNotFoundError:
            return True

    def read(self, start: int, out: Tokens) -> None:
        """Fills `out` with the tokens starting at `start`."""
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

    def view(self, start: int, count: int) -> Tokens | None:
        """Returns the tokens without a copy; None if they are not in one block."""
        block = bisect_right(self._block_stops, start)
        if start + count > self._block_stops[block]:
            return None
        if block not in self._views:
            self._verify(block)
            size, offset = int(self._index.tokens[block]), int(self._index.offsets[block])
            self._views[block] = np.frombuffer(self._content, self._dtype, size, offset)
        start -= self._block_stops[block] - len(self._views[block])
        return self._views[block][start : start + count]

    def document_at(self, token: int) -> tuple[int, int, int]:
        """Returns number, first token and end of the document that contains `token`."""
        document = int(self.document_starts.searchsorted(token, "right")) - 1
        bounds = [*self.document_starts[document : document + 2].tolist(), self.size]
        return document, bounds[0], bounds[1]

    def verify(self) -> None:
        """Verifies every block."""
        for block in range(len(self._index.tokens)):
            self._verify(block)

    def _verify(self, block: int) -> None:
        start, end = self._index.extents[block : block + 2]
        with memoryview(self._content) as view:
            found = zlib.crc32(view[start:end])
        if found != (expected := self._index.crc32[block]):
            where = f"{self._where}: bytes {start} to {end}"
            raise damaged(where, f"CRC32 {expected:08x}", f"{found:08x}")
        tokens = np.frombuffer(
            self._content, self._dtype, int(self._index.tokens[block]), int(self._index.offsets[block])
        )
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise damaged(self._where, f"tokens below {self._vocab_size}, the size of the vocabulary", f"{largest}")
        self._verified[block] = True


def _load_index(folder: LocalFolder | RemoteFolder, shard: Shard, dtype: np.dtype[np.unsignedinteger]) -> ShardIndex:
    with folder.open(shard.index) as file:
        content = file.read()
    _check(shard.index, hashlib.sha256(content).hexdigest(), folder)
    try:
        index = ShardIndex.load(io.BytesIO(content), shard.documents)
        index.check(shard.data.bytes, shard.tokens, shard.documents, dtype.itemsize)
    except ValueError as error:
        raise damaged(folder.where(shard.index), f"the index of {shard.data.name}", str(error)) from error
    return index


def _check(file: StoredFile, found_sha256: str, folder: LocalFolder | RemoteFolder) -> None:
    if found_sha256 != file.sha256:
        raise damaged(folder.where(file), f"SHA-256 {file.sha256}", found_sha256)


def _starts(sizes: NDArray[np.integer] | list[int]) -> NDArray[np.int64]:
    """Returns (N + 1,) where each of N parts starts, and where the last one ends."""
    starts = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=starts[1:])
    return starts
