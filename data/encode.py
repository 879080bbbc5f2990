"""Encodes records to tokens in parallel processes."""

import hashlib
import io
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from triplane.data.blocks import Block
from triplane.data.content import LONG_BYTES, Limits, too_long, unnamed_file
from triplane.data.dedupe import HASH_BYTES, minhash_signature
from triplane.data.manifest import Tokens, token_dtype
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.records import Record, Unread, text_of, text_pieces
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError, TriplaneError, counted
from triplane.storage.open_files import open_files_problem

_CHUNK_BYTES = 1 << 18
"""Stored text that a process encodes per call."""
_CHUNK_RECORDS = 1024
_OWN_FILES = 40
_PIECE_CHARS = 1 << 16


class Encoded(NamedTuple):
    """A document in tokens."""

    parts: Iterable[Tokens]
    """bos, the text's tokens, eos; a long document is encoded while this is iterated over."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    content_hash: bytes
    """16 bytes, the same for the same text."""
    signature: bytes
    """MinHash for finding near duplicates; empty unless requested."""


class Encoding(NamedTuple):
    """Settings for encoding records."""

    tokenizer: Path
    text_field: str
    with_signature: bool
    limits: Limits


Outcome = Encoded | str
"""An encoded document, or the reason why there is none."""


def check_open_files(processes: int) -> None:
    """Raises DataError if the limit on open files is too low for so many processes."""
    if problem := open_files_problem(_OWN_FILES + 2 * processes):
        raise DataError(f"{counted(processes, 'process')}: {problem}, or use fewer --processes")


def encode_records(
    records: Iterable[Record], encoding: Encoding, processes: int
) -> Iterator[list[tuple[Record, Outcome]]]:
    """Yields all records in order, in lists; reads ahead only as far as keeps `processes` busy.

    The parts of a long document must be consumed before the next list is requested. Raises DataError if the tokenizer
    alters a text.
    """
    running: deque[tuple[list[Record], Future[list[Outcome]]]] = deque()

    def finish_oldest() -> list[tuple[Record, Outcome]]:
        chunk, future = running.popleft()
        return list(zip(chunk, future.result(), strict=True))

    context = multiprocessing.get_context("fork")
    with _killed_is_an_error(), ProcessPoolExecutor(processes, context, _follow_parent) as pool:
        for chunk in _chunks(records):
            if _is_long(chunk[0]):
                while running:
                    yield finish_oldest()
                yield [(chunk[0], _encode_long(pool, encoding, chunk[0], ahead=2 * processes))]
                continue
            running.append((chunk, pool.submit(_encode, encoding, chunk)))
            if len(running) > 2 * processes:
                yield finish_oldest()
        while running:
            yield finish_oldest()


@contextmanager
def _killed_is_an_error() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError("an encoding process was killed, perhaps for memory: use fewer processes") from error


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups records, each long one alone."""
    chunk: list[Record] = []
    size = 0
    for record in records:
        if chunk and (_is_long(record) or size >= _CHUNK_BYTES or len(chunk) == _CHUNK_RECORDS):
            yield chunk
            chunk, size = [], 0
        if _is_long(record):
            yield [record]
            continue
        chunk.append(record)
        size += len(record.content) if isinstance(record.content, bytes) else 0
    if chunk:
        yield chunk


def _is_long(record: Record) -> bool:
    content = record.content
    return not isinstance(content, Unread | bytes) or (isinstance(content, bytes) and len(content) > LONG_BYTES)


def _encode(encoding: Encoding, records: list[Record]) -> list[Outcome]:
    return [_encode_one(encoding, record) for record in records]


def _encode_one(encoding: Encoding, record: Record) -> Outcome:
    model = load_tokenizer(encoding.tokenizer)
    try:
        text = text_of(record, encoding.text_field)
        parts = [model.encode_exactly(block, record.name) for block in model.blocks([text])]
    except ValueError as error:
        if isinstance(error, TriplaneError):
            raise
        return str(error)
    content = text.encode()
    return Encoded(
        parts=(np.concatenate(list(_framed(model, parts))),),
        text_bytes=len(content),
        content_hash=hashlib.blake2b(content, digest_size=HASH_BYTES).digest(),
        signature=minhash_signature([text]) if encoding.with_signature else b"",
    )


def _encode_long(pool: ProcessPoolExecutor, encoding: Encoding, record: Record, *, ahead: int) -> Outcome:
    """Writes the text to a file, since accepting a document depends on all of it, then encodes it from there."""
    model = load_tokenizer(encoding.tokenizer)
    hasher = hashlib.blake2b(digest_size=HASH_BYTES)
    try:
        with unnamed_file(encoding.limits) as text:
            for piece in text_pieces(record, encoding.text_field):
                for start in range(0, len(piece), _PIECE_CHARS):
                    content = piece[start : start + _PIECE_CHARS].encode()
                    hasher.update(content)
                    text.write(content)
        size = text.tell()
        if size > encoding.limits.document_bytes:  # its original encoding was shorter
            return too_long(encoding.limits.document_bytes).reason
        for _ in model.blocks(_pieces(text)):
            pass  # raises if the text cannot be cut, before anything is written
    except ValueError as error:
        if isinstance(error, TriplaneError):
            raise
        return str(error)
    parts = _encode_parts(pool, encoding, name=record.name, blocks=model.blocks(_pieces(text)), ahead=ahead)
    signature = minhash_signature(_pieces(text)) if encoding.with_signature else b""
    return Encoded(parts=_framed(model, parts), text_bytes=size, content_hash=hasher.digest(), signature=signature)


def _encode_parts(
    pool: ProcessPoolExecutor, encoding: Encoding, *, name: str, blocks: Iterator[Block], ahead: int
) -> Iterator[Tokens]:
    running: deque[Future[Tokens]] = deque()
    with _killed_is_an_error():
        for block in blocks:
            running.append(pool.submit(_encode_block, encoding.tokenizer, block, name))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _encode_block(tokenizer: Path, block: Block, name: str) -> Tokens:
    return load_tokenizer(tokenizer).encode_exactly(block, name)


def _framed(model: Tokenizer, parts: Iterable[Tokens]) -> Iterator[Tokens]:
    dtype = token_dtype(model.vocab_size)
    yield np.array([model.bos_id], dtype)
    yield from parts
    yield np.array([model.eos_id], dtype)


def _pieces(file: BinaryIO) -> Iterator[str]:
    """Yields the text of a UTF-8 file from its start."""
    file.seek(0)
    reader = io.TextIOWrapper(file, "utf-8", newline="")
    try:
        while piece := reader.read(_PIECE_CHARS):
            yield piece
    finally:
        reader.detach()


@cache
def load_tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(path)


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and exits with it: an orphaned worker would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
