"""Writes shards: tars that any WebDataset reader can read, each with an index that makes every token addressable.

A sample holds up to 256 documents: with one document per sample tar headers would cost 14 %, with blocks 0.3 %.
`tok.npy` contains their tokens end to end, `len.npy` their lengths.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from triplane.data.index import index_shard
from triplane.data.journal import Journal
from triplane.data.manifest import Manifest, Shard, Split, StoredFile, Tokens, token_dtype
from triplane.data.report import Counts
from triplane.data.tokenizer import Tokenizer
from triplane.storage.files import replacing

_BLOCK_DOCUMENTS = 256
_BLOCK_TOKENS = 1 << 20
"""Bounds what one checksum covers; a longer document gets its own block."""


class SplitWriter:
    """Writes the documents of one split to shards of at least `shard_tokens`, and its manifest.

    Documents wait for their shard in the journal's logs, not in memory.
    """

    def __init__(
        self, parent: Path, split: Split, journal: Journal, *, tokenizer: Tokenizer, shard_tokens: int, counts: Counts
    ):
        """Resumes from the journal's last commit, after verifying the checksums of its finished shards."""
        folder = parent / split
        folder.mkdir(parents=True, exist_ok=True)
        self._split = split
        self._left: list[Tokens] | None = None
        self.counts = counts
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._shard_bytes = shard_tokens * self._dtype.itemsize
        self._tokens = journal.log(f"{folder.name}.tokens")
        self._lengths = journal.log(f"{folder.name}.lengths")
        self._shard_log = journal.log(f"{folder.name}.shards.jsonl")
        self._shards = [Shard.model_validate_json(line) for line in self._shard_log.read().splitlines()]
        for shard in self._shards:
            shard.data.check_content(folder)
            shard.index.check_content(folder)

    def add(self, parts: Iterable[Tokens], text_bytes: int) -> bool:
        """Appends a document, whose `parts` start with bos, end with eos, and encode `text_bytes` of text.

        Returns True if this finished a shard, after which the journal should be committed.
        """
        count = 0
        for part in parts:
            assert part.dtype == self._dtype
            self._tokens.append(part.tobytes())
            count += len(part)
        self.counts.add(count, text_bytes)
        self._lengths.append(np.uint32(count).tobytes())
        if self._tokens.size < self._shard_bytes:
            return False
        self._finish_shard()
        return True

    @property
    def has_shards(self) -> bool:
        """True if a shard is finished, whose documents cannot be taken back."""
        return bool(self._shards)

    def take_last(self) -> tuple[list[Tokens], bool]:
        """Removes and returns the last document and its copies, and whether others remain.

        Requires that no shard is finished. Only for use before `close`, which then writes the others; the journal keeps
        all documents.
        """
        assert not self._shards
        lengths = np.frombuffer(self._lengths.read(), np.uint32)
        if not len(lengths):
            return [], False
        documents = np.split(np.frombuffer(self._tokens.read(), self._dtype), np.cumsum(lengths[:-1], dtype=np.int64))
        taken = [document for document in documents if np.array_equal(document, documents[-1])]
        self._left = [document for document in documents if not np.array_equal(document, documents[-1])]
        return taken, bool(self._left)

    def put(self, document: Tokens) -> None:
        """Adds a document that is not in the journal, for `close` to write."""
        self._left = [*(self._left or ()), document]

    def close(self) -> Manifest:
        """Writes the last shard, then the manifest; requires at least one document."""
        if self._left:
            stored = io.BytesIO(np.concatenate(self._left).tobytes())
            lengths = np.array([len(document) for document in self._left], np.uint32)
            self._write(stored, lengths)
        elif self._left is None and self._tokens.size:
            self._finish_shard()
        manifest = Manifest(
            split=self._split,
            tokenizer_digest=self._tokenizer.digest,
            tokenizer_files=tuple(self._tokenizer.files),
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            eos_id=self._tokenizer.eos_id,
            text_bytes=self.counts.text_bytes,
            shards=tuple(self._shards),
        )
        manifest.save(self._folder)
        return manifest

    def _finish_shard(self) -> None:
        lengths = np.frombuffer(self._lengths.read(), np.uint32)
        with self._tokens.open() as tokens:
            shard = self._write(tokens, lengths)
        self._shard_log.append(shard.model_dump_json().encode() + b"\n")
        self._tokens.restart()
        self._lengths.restart()

    def _write(self, tokens: BinaryIO, lengths: NDArray[np.uint32]) -> Shard:
        shard = write_shard(self._folder, len(self._shards), tokens=tokens, lengths=lengths, dtype=self._dtype)
        self._shards.append(shard)
        return shard


def write_shard(
    folder: Path, number: int, *, tokens: BinaryIO, lengths: NDArray[np.uint32], dtype: np.dtype[np.unsignedinteger]
) -> Shard:
    """Writes a shard and its index, each atomically; their bytes depend on the documents alone.

    `tokens` contains the documents, of `lengths` tokens, end to end.
    """
    import webdataset  # loads torch

    path = folder / f"shard-{number:06d}.tar"
    written = 0
    size_bytes = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    with replacing(path, size_bytes) as file, webdataset.TarWriter(file, mtime=0) as tar:
        for block in _blocks(lengths):
            key = f"{number:06d}/{written:09d}"
            tar.write({"__key__": key, "len.npy": block})
            _write_tokens(tar, f"{key}.tok.npy", tokens, count=int(block.sum(dtype=np.int64)), dtype=dtype)
            written += len(block)
    index = index_shard(path)
    index_path = path.with_suffix(".idx.npz")
    index.save(index_path)
    return Shard(
        data=StoredFile.of(path),
        index=StoredFile.of(index_path),
        documents=len(index.lengths),
        tokens=int(index.tokens.sum()),
    )


def _write_tokens(tar: Any, name: str, tokens: BinaryIO, *, count: int, dtype: np.dtype[np.unsignedinteger]) -> None:
    """Writes the next `count` of `tokens` as an array, as TarWriter would with three copies in memory."""
    header = io.BytesIO()
    kind = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": (count,)})
    info = tarfile.TarInfo(name)
    info.size = header.tell() + count * dtype.itemsize
    info.mtime, info.mode, info.uname, info.gname = tar.mtime, tar.mode, tar.user, tar.group
    tar.tarstream.addfile(info, _Joined(header.getvalue(), tokens))


class _Joined:
    """A file that starts with `head`."""

    def __init__(self, head: bytes, rest: BinaryIO):
        self._head = head
        self._rest = rest

    def read(self, size: int) -> bytes:
        taken, self._head = self._head[:size], self._head[size:]
        return taken + self._rest.read(size - len(taken))


def _blocks(lengths: NDArray[np.uint32]) -> Iterator[NDArray[np.uint32]]:
    """Yields the lengths of the documents of each block."""
    start, size = 0, 0
    for number, length in enumerate(lengths.tolist()):
        if number > start and (number - start == _BLOCK_DOCUMENTS or size + length > _BLOCK_TOKENS):
            yield lengths[start:number]
            start, size = number, 0
        size += length
    yield lengths[start:]
