"""Text to corpus: reads, splits, tokenizes in parallel and writes, with one result for any number of processes."""

import hashlib
import multiprocessing
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field

from triplane.data.corpus import Corpus
from triplane.data.errors import DataError
from triplane.data.files import sync_folder, write_whole
from triplane.data.manifest import Manifest, Tokens, token_dtype
from triplane.data.shards import SplitWriter
from triplane.data.sources import Document, Rejection, read_documents
from triplane.data.tokenizer import Tokenizer

_REPORT_NAME = "report.json"
_CHUNK_CHARS = 1 << 18
"""Text that a process tokenizes at once."""


class Counts(BaseModel, extra="forbid", frozen=True):
    """The size of a split."""

    documents: int
    tokens: int
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each stored token, bos and eos among them."""
        return self.text_bytes / self.tokens


class Report(BaseModel, extra="forbid", frozen=True):
    """What `prepare` did."""

    fingerprint: str
    """Of the documents, the tokenizer and the settings."""
    train: Counts
    validation: Counts
    rejected: tuple[Rejection, ...]
    """Documents that are not in the corpus, and why."""
    reused: bool = Field(default=False, exclude=True)
    """True: the folder held this corpus already."""


def prepare(
    inputs: list[str],
    out: Path,
    tokenizer: Path,
    validation_fraction: float,
    shard_tokens: int,
    processes: int,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Writes the documents of `inputs` to `out`: `tokenizer.model`, `train/`, `validation/` and `report.json`.

    `out` appears when all of it is written. Which split a document is in depends on its content alone, so copies of
    it are all in one. `progress` gets the documents and bytes of text so far. Raises DataError if `out` holds
    something else, an input can't be read, a split is empty, the tokenizer alters a text or the disk is full.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, is {validation_fraction}")
    model = Tokenizer(tokenizer)
    rejected: list[Rejection] = []
    documents = read_documents(inputs, rejected.append)
    fingerprint = hashlib.sha256(f"{model.digest} {validation_fraction} {shard_tokens}".encode())
    if out.exists() and any(out.iterdir()):
        for document in documents:
            fingerprint.update(_content_hash(document))
        return _reuse(out, fingerprint.hexdigest())
    staging = out.with_name(f"{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write_whole(staging / "tokenizer.model", tokenizer.read_bytes())
        train = SplitWriter(staging / "train", model, shard_tokens)
        validation = SplitWriter(staging / "validation", model, shard_tokens)
        n_documents = text_bytes = 0
        for document, tokens in _tokenized(documents, tokenizer, processes):
            content_hash = _content_hash(document)
            fingerprint.update(content_hash)
            is_validation = int.from_bytes(content_hash[:8], "little") < validation_fraction * 2**64
            size = len(document.text.encode())
            (validation if is_validation else train).add(tokens, size)
            n_documents += 1
            text_bytes += size
            if progress:
                progress(n_documents, text_bytes)
        if not n_documents:
            raise DataError(f"{', '.join(inputs)}: no text in there ({len(rejected)} documents rejected)")
        report = Report(
            fingerprint=fingerprint.hexdigest(),
            train=_counts(train.close(), n_documents, validation_fraction),
            validation=_counts(validation.close(), n_documents, validation_fraction),
            rejected=tuple(rejected),
        )
        write_whole(staging / _REPORT_NAME, report.model_dump_json(indent=1).encode())
        staging.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _reuse(out: Path, fingerprint: str) -> Report:
    if not (out / _REPORT_NAME).exists():
        raise DataError(f"{out}: holds files that are no corpus: name another folder")
    report = Report.model_validate_json((out / _REPORT_NAME).read_bytes())
    if report.fingerprint != fingerprint:
        raise DataError(
            f"{out}: holds the corpus {report.fingerprint[:12]}, not {fingerprint[:12]}, which other documents, "
            "tokenizer or settings give: name another folder or remove this one"
        )
    for split in ("train", "validation"):
        Corpus(out / split)
    return report.model_copy(update={"reused": True})


def _counts(manifest: Manifest | None, documents: int, validation_fraction: float) -> Counts:
    if manifest is None:
        raise DataError(
            f"a split is empty: validation_fraction {validation_fraction} of {documents} documents: "
            "give more documents or another fraction"
        )
    return Counts(documents=manifest.documents, tokens=manifest.tokens, text_bytes=manifest.text_bytes)


def _tokenized(documents: Iterable[Document], tokenizer: Path, processes: int) -> Iterator[tuple[Document, Tokens]]:
    """Each document, in order, with its tokens; reads only so far ahead as keeps the processes busy."""
    running: deque[tuple[list[Document], Future[list[Tokens]]]] = deque()

    def finish_oldest() -> Iterator[tuple[Document, Tokens]]:
        chunk, future = running.popleft()
        yield from zip(chunk, future.result(), strict=True)

    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        try:
            for chunk in _chunks(documents):
                running.append((chunk, pool.submit(_tokenize, tokenizer, chunk)))
                if len(running) > 2 * processes:
                    yield from finish_oldest()
            while running:
                yield from finish_oldest()
        except BrokenProcessPool as error:
            raise DataError("a tokenizing process was killed, perhaps for memory: use fewer processes") from error


def _tokenize(tokenizer: Path, documents: list[Document]) -> list[Tokens]:
    model = _load_tokenizer(tokenizer)
    dtype = token_dtype(model.vocab_size)
    return [
        np.array([model.bos_id, *model.encode_exactly(text, name), model.eos_id], dtype) for name, text in documents
    ]


@cache
def _load_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)


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


def _content_hash(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()
