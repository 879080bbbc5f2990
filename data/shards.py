"""Shards: tars that any WebDataset reader can read, each with an index that makes every token addressable.

A sample holds up to 256 documents, since one document a sample costs 14 % in tar headers and blocks cost 0.3 %:
`tok.npy` is their tokens end to end, `len.npy` the length of each.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import webdataset

from triplane.data.files import replacing
from triplane.data.index import index_shard
from triplane.data.manifest import Manifest, Shard, StoredFile, Tokens, token_dtype
from triplane.data.tokenizer import Tokenizer

_BLOCK_DOCUMENTS = 256
_BLOCK_TOKENS = 1 << 20
"""Bounds what one checksum covers; a longer document is a block of its own."""


class SplitWriter:
    """Collects the documents of one split into shards of about `shard_tokens`, and its manifest."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        folder.mkdir()
        self.documents = 0
        self.text_bytes = 0
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._pending: list[Tokens] = []
        self._pending_tokens = 0
        self._shards: list[Shard] = []

    def add(self, tokens: Tokens, text_bytes: int) -> None:
        """Appends a document: `tokens` starts with bos and ends with eos, and came from so many bytes of text."""
        self.documents += 1
        self.text_bytes += text_bytes
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        if self._pending_tokens >= self._shard_tokens:
            self._flush()

    def close(self) -> Manifest:
        """Writes the last shard, then the manifest; there must be a document."""
        if self._pending:
            self._flush()
        manifest = Manifest(
            tokenizer_digest=self._tokenizer.digest,
            vocab_size=self._tokenizer.vocab_size,
            bos_id=self._tokenizer.bos_id,
            text_bytes=self.text_bytes,
            shards=tuple(self._shards),
        )
        manifest.save(self._folder)
        return manifest

    def _flush(self) -> None:
        dtype = token_dtype(self._tokenizer.vocab_size)
        self._shards.append(write_shard(self._folder, len(self._shards), self._pending, dtype))
        self._pending, self._pending_tokens = [], 0


def write_shard(folder: Path, number: int, documents: Sequence[Tokens], dtype: np.dtype[np.unsignedinteger]) -> Shard:
    """Writes a shard and its index, each of which appears whole; the same documents give the same bytes."""
    path = folder / f"shard-{number:06d}.tar"
    written = 0
    size_bytes = sum(map(len, documents)) * dtype.itemsize
    with replacing(path, size_bytes) as file, webdataset.TarWriter(file, mtime=0) as tar:
        for block in _blocks(documents):
            lengths = np.array([len(document) for document in block], np.uint32)
            tokens = np.concatenate(block).astype(dtype)
            tar.write({"__key__": f"{number:06d}/{written:09d}", "tok.npy": tokens, "len.npy": lengths})
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


def _blocks(documents: Sequence[Tokens]) -> Iterator[list[Tokens]]:
    block: list[Tokens] = []
    size = 0
    for document in documents:
        if block and (len(block) == _BLOCK_DOCUMENTS or size + len(document) > _BLOCK_TOKENS):
            yield block
            block, size = [], 0
        block.append(document)
        size += len(document)
    yield block
