"""Records to tokens in parallel processes."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triplane.data.blocks import UncuttableError
from triplane.data.dedupe import HASH_BYTES, minhash_signature
from triplane.data.errors import DataError
from triplane.data.manifest import Tokens, token_dtype
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.records import Record, text_of
from triplane.data.tokenizer import Tokenizer

_CHUNK_BYTES = 1 << 18
"""Stored text that a process encodes at once."""
_CHUNK_RECORDS = 1024


class Encoded(NamedTuple):
    """A document in tokens."""

    tokens: Tokens
    """bos, those of the text, eos."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    content_hash: bytes
    """16 bytes, the same for the same text."""
    signature: bytes
    """What near duplicates share much of; empty if it is not asked for."""


class Encoding(NamedTuple):
    """How records become tokens."""

    tokenizer: Path
    text_field: str
    with_signature: bool


Outcome = Encoded | str
"""A document in tokens, or the reason why there is none."""


def encode_records(
    records: Iterable[Record], encoding: Encoding, processes: int
) -> Iterator[list[tuple[Record, Outcome]]]:
    """Yields all records, in order, in lists; reads ahead only what keeps `processes` busy.

    Raises DataError if the tokenizer alters a text.
    """
    running: deque[tuple[list[Record], Future[list[Outcome]]]] = deque()

    def finish_oldest() -> list[tuple[Record, Outcome]]:
        chunk, future = running.popleft()
        return list(zip(chunk, future.result(), strict=True))

    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _follow_parent) as pool:
        try:
            for chunk in _chunks(records):
                running.append((chunk, pool.submit(_encode, encoding, chunk)))
                if len(running) > 2 * processes:
                    yield finish_oldest()
            while running:
                yield finish_oldest()
        except BrokenProcessPool as error:
            raise DataError("an encoding process was killed, perhaps for memory: use fewer processes") from error


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.content or b"")
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(encoding: Encoding, records: list[Record]) -> list[Outcome]:
    return [_encode_one(encoding, record) for record in records]


def _encode_one(encoding: Encoding, record: Record) -> Outcome:
    try:
        text = text_of(record, encoding.text_field)
    except ValueError as error:
        return str(error)
    model = _load_tokenizer(encoding.tokenizer)
    dtype = token_dtype(model.vocab_size)
    try:
        parts = [model.encode_exactly(block, record.name) for block in model.blocks([text])]
    except UncuttableError as error:
        return str(error)
    content = text.encode()
    return Encoded(
        np.concatenate([np.array([model.bos_id], dtype), *parts, np.array([model.eos_id], dtype)]),
        len(content),
        hashlib.blake2b(content, digest_size=HASH_BYTES).digest(),
        minhash_signature(text) if encoding.with_signature else b"",
    )


@cache
def _load_tokenizer(path: Path) -> Tokenizer:
    return open_tokenizer(path)


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: a worker whose parent is killed would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
