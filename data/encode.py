"""Documents to tokens in parallel processes."""

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

import numpy as np

from triplane.data.errors import DataError
from triplane.data.manifest import Tokens, token_dtype
from triplane.data.sources import Document
from triplane.data.tokenizer import Tokenizer

_CHUNK_CHARS = 1 << 18
"""Text that a process encodes at once."""


def encode_documents(
    documents: Iterable[Document], tokenizer: Path, processes: int
) -> Iterator[tuple[Document, Tokens]]:
    """Yields each document, in order, with bos, its tokens and eos; reads ahead only what keeps `processes` busy.

    Raises DataError if the tokenizer alters a text.
    """
    running: deque[tuple[list[Document], Future[list[Tokens]]]] = deque()

    def finish_oldest() -> Iterator[tuple[Document, Tokens]]:
        chunk, future = running.popleft()
        yield from zip(chunk, future.result(), strict=True)

    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _follow_parent) as pool:
        try:
            for chunk in _chunks(documents):
                running.append((chunk, pool.submit(_encode, tokenizer, chunk)))
                if len(running) > 2 * processes:
                    yield from finish_oldest()
            while running:
                yield from finish_oldest()
        except BrokenProcessPool as error:
            raise DataError("an encoding process was killed, perhaps for memory: use fewer processes") from error


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(tokenizer: Path, documents: list[Document]) -> list[Tokens]:
    model = _load_tokenizer(tokenizer)
    dtype = token_dtype(model.vocab_size)
    return [
        np.array([model.bos_id, *model.encode_exactly(text, name), model.eos_id], dtype) for name, text in documents
    ]


@cache
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _follow_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends with it: a worker whose parent is killed would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
