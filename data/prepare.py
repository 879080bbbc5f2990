"""Text to corpus: reads, splits, tokenizes in parallel and writes, with one result for any number of processes."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from triplane.data.corpus import Corpus
from triplane.data.encode import encode_documents
from triplane.data.errors import DataError
from triplane.data.files import new_folder, write_whole
from triplane.data.manifest import Manifest
from triplane.data.shards import SplitWriter
from triplane.data.sources import Document, Rejection, read_documents
from triplane.data.tokenizer import Tokenizer

_REPORT_NAME = "report.json"


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
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        return _reuse(out, documents, fingerprint)
    with new_folder(out) as folder:
        write_whole(folder / "tokenizer.model", tokenizer.read_bytes())
        train = SplitWriter(folder / "train", model, shard_tokens)
        validation = SplitWriter(folder / "validation", model, shard_tokens)
        for document, tokens in encode_documents(documents, tokenizer, processes):
            content_hash = _content_hash(document)
            fingerprint.update(content_hash)
            is_validation = int.from_bytes(content_hash[:8], "little") < validation_fraction * 2**64
            (validation if is_validation else train).add(tokens, len(document.text.encode()))
            if progress:
                progress(train.documents + validation.documents, train.text_bytes + validation.text_bytes)
        if not (train.documents and validation.documents):
            raise DataError(
                f"{', '.join(inputs)}: {train.documents} documents for training and {validation.documents} for "
                f"validation ({len(rejected)} rejected), each needs one: give more text or another "
                f"validation_fraction than {validation_fraction}"
            )
        report = Report(
            fingerprint=fingerprint.hexdigest(),
            train=_counts(train.close()),
            validation=_counts(validation.close()),
            rejected=tuple(rejected),
        )
        write_whole(folder / _REPORT_NAME, report.model_dump_json(indent=1).encode())
    return report


def _reuse(out: Path, documents: Iterable[Document], fingerprint: "hashlib._Hash") -> Report:
    try:
        report = Report.model_validate_json((out / _REPORT_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{out}: holds something that is no finished corpus: name another folder") from error
    for document in documents:
        fingerprint.update(_content_hash(document))
    if report.fingerprint != fingerprint.hexdigest():
        raise DataError(
            f"{out}: holds the corpus {report.fingerprint[:12]}, not {fingerprint.hexdigest()[:12]}, which these "
            "documents, tokenizer and settings give: name another folder or remove this one"
        )
    for split in ("train", "validation"):
        Corpus(out / split)
    return report.model_copy(update={"reused": True})


def _counts(manifest: Manifest) -> Counts:
    return Counts(documents=manifest.documents, tokens=manifest.tokens, text_bytes=manifest.text_bytes)


def _content_hash(document: Document) -> bytes:
    return hashlib.blake2b(document.text.encode(), digest_size=16).digest()
