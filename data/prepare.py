"""Prepares a corpus from text: reads, splits, tokenizes in parallel and writes, whatever the number of processes.

A run that was killed resumes from its last finished shard, and the result is the same to the byte.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pydantic import BaseModel, Field

from triplane.data.content import DEFAULT_LIMITS, Limits
from triplane.data.corpus import Corpus
from triplane.data.dedupe import Dedupe, Duplicates, check_library
from triplane.data.encode import Encoding, Outcome, check_open_files, encode_records
from triplane.data.holdout import MOST_TOKENS, hold_out, text_and_its_end
from triplane.data.journal import Journal
from triplane.data.open_tokenizer import open_tokenizer
from triplane.data.readers import read_records
from triplane.data.records import Position, Record, Rejection, text_of
from triplane.data.report import Counts, Recipe, Rejected, Report
from triplane.data.shards import SplitWriter
from triplane.data.sources import SourceFile, find_files
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError
from triplane.storage.files import replacing, sync, write_whole
from triplane.storage.locks import locked_folder

_REPORT_NAME = "report.json"


class Progress(NamedTuple):
    """Progress of a preparation, including its interrupted runs."""

    documents: int
    text_bytes: int
    tokens: int
    read_bytes: int
    total_bytes: int | None
    """Size of all input files, None if a server does not report it."""


def prepare(
    inputs: Sequence[str],
    out: Path,
    tokenizer: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
    processes: int,
    progress: Callable[[Progress], object] | None = None,
    text_field: str = "text",
    dedupe: Dedupe = "none",
    max_document_bytes: int = DEFAULT_LIMITS.document_bytes,
    wait: bool = False,
) -> Report:
    """Writes the documents of `inputs` (see find_files) to `out`: the tokenizer's files, `train/`, `validation/`,
    `report.json`, and `rejected.jsonl`, which names each input that is not in the corpus.

    `text_field` is the field of JSON rows and the column of tables with the text. Documents of more than
    `max_document_bytes` are rejected. The split of a document depends on its content alone, so all its copies are in
    one; but if one split would be empty and no shard of the other is finished, the last document and its copies move
    there, or the end of a single one. `out` appears when it is complete; until then finished shards stay in `out` with
    `.partial` appended, and the same call resumes from there. If another process is writing there, `wait` says whether
    to wait for its corpus. Raises DataError if `out` has other content or was started with other inputs or settings, an
    input is unreadable, a split is empty, or the tokenizer alters a text, and StorageError if the disk is full.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction must be between 0 and 1, is {validation_fraction}")
    check_library(dedupe)
    check_open_files(processes)
    out = _replaceable(out)
    model = open_tokenizer(tokenizer)
    skipped: list[Rejection] = []
    files = find_files(inputs, skipped.append)
    recipe = Recipe(
        inputs_digest=_digest(files),
        tokenizer_digest=model.digest,
        validation_fraction=validation_fraction,
        shard_tokens=shard_tokens,
        text_field=text_field,
        dedupe=dedupe,
        max_document_bytes=max_document_bytes,
    )
    partial = out.with_name(f"{out.name}.partial")
    if not _is_taken(out) or partial.exists():
        with locked_folder(partial, wait=wait):
            try:
                if not _is_taken(out):
                    halves = _halves(files, recipe)
                    files = halves or files
                    build = _Build(partial, recipe, model, skipped, cut=bool(halves))
                    limits = Limits(max_document_bytes, partial)
                    records = read_records(files, text_field, build.state.position, limits=limits)
                    encoding = Encoding(
                        tokenizer=tokenizer, text_field=text_field, with_signature=dedupe == "near", limits=limits
                    )
                    chunks = encode_records(records, encoding, processes)
                    build.fill(chunks, _sum_sizes(files), progress)
                    return build.finish(out)
            finally:
                if _is_taken(out) or not Journal.exists(partial):  # nothing to resume from
                    shutil.rmtree(partial)
    return _reuse(out, recipe)


def read_documents(
    inputs: Sequence[str],
    reject: Callable[[Rejection], object],
    text_field: str = "text",
    *,
    progress: Callable[[int, int | None], object] | None = None,
) -> Iterator[tuple[str, str]]:
    """Yields name and text of the documents of `inputs` in the order of `prepare`; passes others to `reject`.

    `progress` takes the bytes read and their total, None if a server does not report it.

    Raises DataError as `prepare` does; for inputs without documents before the first is asked for.
    """
    return _texts(find_files(inputs, reject), reject, text_field, progress)


def _texts(
    files: Sequence[SourceFile],
    reject: Callable[[Rejection], object],
    text_field: str,
    progress: Callable[[int, int | None], object] | None,
) -> Iterator[tuple[str, str]]:
    total_bytes = _sum_sizes(files)
    for record in read_records(files, text_field, Position()):
        if progress:
            progress(record.read_bytes, total_bytes)
        try:
            yield record.name, text_of(record, text_field)
        except ValueError as error:
            reject(Rejection(name=record.name, reason=str(error)))


class _State(BaseModel, extra="forbid"):
    """The state at a commit."""

    recipe: Recipe
    position: Position = Position()
    train: Counts = Field(default_factory=Counts)
    validation: Counts = Field(default_factory=Counts)
    rejected: dict[str, Rejected] = Field(default_factory=dict)


class _Build:
    """An unfinished corpus, in its own folder."""

    def __init__(self, folder: Path, recipe: Recipe, tokenizer: Tokenizer, skipped: Sequence[Rejection], *, cut: bool):
        """Resumes from the last commit in `folder`, if any; raises DataError if it has another recipe.

        `cut` means that there are two files, one for each split.
        """
        self._folder = folder
        self._cut = cut
        self._tokenizer = tokenizer
        self._journal = Journal(folder)
        self.state = _State(recipe=recipe)
        if self._journal.state is not None:
            if difference := recipe.difference(self._journal.state["recipe"]):
                raise DataError(f"{folder}: was started with {difference}: remove it or name another folder")
            self.state = _State.model_validate(self._journal.state)
        self._corpus = folder / "corpus"
        self._corpus.mkdir(exist_ok=True)
        self._rejections = self._journal.log("rejected.jsonl")
        self._duplicates = Duplicates(self._journal, recipe.dedupe)
        self._train = SplitWriter(
            self._corpus,
            "train",
            self._journal,
            tokenizer=tokenizer,
            shard_tokens=recipe.shard_tokens,
            counts=self.state.train,
        )
        self._validation = SplitWriter(
            self._corpus,
            "validation",
            self._journal,
            tokenizer=tokenizer,
            shard_tokens=recipe.shard_tokens,
            counts=self.state.validation,
        )
        if self._journal.state is None:
            for rejection in skipped:
                self._reject(rejection)

    def fill(
        self,
        chunks: Iterator[list[tuple[Record, Outcome]]],
        total_bytes: int | None,
        progress: Callable[[Progress], object] | None,
    ) -> None:
        """Adds all documents, and commits after each shard."""
        if progress:
            progress(self._progress(0, total_bytes))
        for chunk in chunks:
            for record, outcome in chunk:
                if self._add(record, outcome):
                    self.state.position = record.end
                    self._journal.commit(self.state)
            if progress:
                progress(self._progress(chunk[-1][0].read_bytes, total_bytes))

    def _progress(self, read_bytes: int, total_bytes: int | None) -> Progress:
        splits = (self.state.train, self.state.validation)
        documents, tokens, text_bytes = (
            sum(getattr(split, key) for split in splits) for key in ("documents", "tokens", "text_bytes")
        )
        return Progress(
            documents=documents,
            text_bytes=text_bytes,
            tokens=tokens,
            read_bytes=read_bytes,
            total_bytes=total_bytes,
        )

    def finish(self, out: Path) -> Report:
        """Publishes the corpus at `out`."""
        train, validation, rejected = self.state.train, self.state.validation, self.state.rejected
        cut = self._cut
        if not (train.documents and validation.documents):
            cut = hold_out(self._train, self._validation, self._tokenizer, self.state.recipe.validation_fraction)
        if not (train.documents and validation.documents):
            Journal.remove(self._folder)
            reasons = [f"{what.count} left out because {why}, first {what.first}" for why, what in rejected.items()]
            if train.documents + validation.documents > 1:
                reasons.append(f"{'raise' if train.documents else 'lower'} validation_fraction")
            elif train.tokens + validation.tokens > MOST_TOKENS:
                reasons.append(f"the only document is over {MOST_TOKENS:,} tokens, too long to cut: split the file")
            raise DataError(
                f"{out}: {train.documents} documents for training and {validation.documents} for validation, but each "
                f"split needs one: {'; '.join([*reasons, 'give more text, in more documents'])}"
            )
        self._train.close()
        self._validation.close()
        self._tokenizer.save(self._corpus)
        with (
            self._rejections.open() as rejections,
            replacing(self._corpus / "rejected.jsonl", self._rejections.size) as copy,
        ):
            shutil.copyfileobj(rejections, copy)
        report = Report(
            recipe=self.state.recipe, train=train, validation=validation, rejected=rejected, validation_is_end=cut
        )
        write_whole(self._corpus / _REPORT_NAME, report.model_dump_json(indent=1).encode())
        self._journal.close()
        self._corpus.rename(out)
        sync(out.parent)
        return report

    def _add(self, record: Record, outcome: Outcome) -> bool:
        """Returns True if this finished a shard."""
        if isinstance(outcome, str):
            self._reject(Rejection(name=record.name, reason=outcome))
            return False
        if duplicate := self._duplicates.find(outcome.content_hash, outcome.signature):
            self._reject(Rejection(name=record.name, reason=duplicate))
            return False
        is_validation = (
            record.end.file == 1
            if self._cut
            else int.from_bytes(outcome.content_hash[:8], "little") < self.state.recipe.validation_fraction * 2**64
        )
        return (self._validation if is_validation else self._train).add(outcome.parts, outcome.text_bytes)

    def _reject(self, rejection: Rejection) -> None:
        self._rejections.append(rejection.model_dump_json().encode() + b"\n")
        reason, colon, details = rejection.reason.partition(":")
        first = rejection.name + colon + details
        self.state.rejected.setdefault(reason, Rejected(first=first)).count += 1


def _reuse(out: Path, recipe: Recipe) -> Report:
    path = out / _REPORT_NAME
    try:
        stored = json.loads(path.read_bytes())
        difference = recipe.difference(stored["recipe"])
        report = None if difference else Report.model_validate(stored)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out}: is not a finished corpus: name another folder") from error
    if report is None:
        raise DataError(f"{out}: contains a corpus with {difference}: name another folder or remove this one")
    Corpus.open_splits(out)
    return report.model_copy(update={"reused": True})


def _replaceable(out: Path) -> Path:
    """Returns the real path of `out`; raises DataError if a finished corpus could not be moved there."""
    try:
        real = out.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{out}: cannot be written: a loop of links: name another folder") from error
    if real.is_dir() and not _is_taken(real):
        if real.is_mount():
            raise DataError(f"{out}: is a mount point, which cannot be replaced: name a folder in it")
        if real == Path.cwd() or real in Path.cwd().parents:
            raise DataError(f"{out}: contains the working folder, so it cannot be replaced: name a folder in it")
    return real


def _is_taken(out: Path) -> bool:
    return out.is_file() or (out.is_dir() and any(out.iterdir()))


def _digest(files: Sequence[SourceFile]) -> str:
    lines = (f"{PurePosixPath(file.path).name} {file.size} {file.version}\n" for file in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _halves(files: Sequence[SourceFile], recipe: Recipe) -> list[SourceFile]:
    if len(files) > 1:
        return []
    return text_and_its_end(files[0], recipe.validation_fraction, most_bytes=recipe.max_document_bytes)


def _sum_sizes(files: Sequence[SourceFile]) -> int | None:
    sizes = [file.size for file in files if file.size is not None]
    return sum(sizes) if len(sizes) == len(files) else None
