"""`triplane tokenizer train`, `triplane prepare`, and `triplane inspect` for a corpus; imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from triplane.data.corpus import Corpus
from triplane.data.dedupe import Dedupe
from triplane.data.inspect import describe
from triplane.data.prepare import prepare as prepare_corpus
from triplane.data.prepare import read_documents
from triplane.data.records import Rejection
from triplane.data.tokenizer_training import train_tokenizer as train_sentencepiece
from triplane.launcher.progress_bar import PreparationBar, TokenizerBar, show_report
from triplane.storage.errors import DataError

_SHOWN_REJECTIONS = 10


def train_tokenizer(inputs: list[str], out: Path, *, vocab_size: int | None, text_field: str) -> None:
    """Trains a tokenizer on the documents of `inputs` and prints the result."""
    console = Console(highlight=False, soft_wrap=True)
    if out.exists():
        raise DataError(f"{out} exists; remove it or give another --out")
    rejected: list[Rejection] = []
    bar = TokenizerBar(console)
    # Raises DataError before there is a folder.
    documents = read_documents(inputs, rejected.append, text_field, progress=bar.read)
    out.parent.mkdir(parents=True, exist_ok=True)
    with bar:
        tokenizer = train_sentencepiece(_texts(documents, bar), out, vocab_size)
    _show_rejections(console, rejected)
    console.print(f"{out}: {tokenizer.vocab_size:,} tokens, lossless on every text", markup=False)


def _texts(documents: Iterator[tuple[str, str]], bar: TokenizerBar) -> Iterator[str]:
    for _, text in documents:
        yield text
    bar.train()


def prepare(
    inputs: list[str],
    out: Path,
    tokenizer: Path,
    *,
    validation_fraction: float,
    shard_tokens: int,
    processes: int,
    text_field: str,
    dedupe: Dedupe,
    max_document_bytes: int,
) -> None:
    """Writes a corpus and prints its contents."""
    console = Console(highlight=False, soft_wrap=True)
    with PreparationBar(console) as bar:
        report = prepare_corpus(
            inputs,
            out,
            tokenizer,
            validation_fraction=validation_fraction,
            shard_tokens=shard_tokens,
            processes=processes,
            progress=bar.update,
            text_field=text_field,
            dedupe=dedupe,
            max_document_bytes=max_document_bytes,
        )
    state = "holds this corpus already" if report.reused else "written"
    console.print(f"{out}: {state}", markup=False)
    show_report(console, report)


def show_corpus(console: Console, folder: Path, documents: int, verify: bool) -> None:
    """Prints the contents of a corpus; `verify` reads all of it."""
    for line in _describe_lines(describe(folder, documents), indent=0):
        console.print(line, markup=False)
    if verify:
        for corpus in Corpus.open_splits(folder):
            corpus.verify()
        console.print("all checksums match")


def _describe_lines(value: dict[Any, Any], indent: int) -> Iterator[str]:
    pad = "  " * indent
    for key, below in value.items():
        if isinstance(below, dict):
            yield f"{pad}{key}"
            yield from _describe_lines(below, indent + 1)
        elif isinstance(below, list):
            yield f"{pad}{key}"
            yield from (f"{pad}  --- {number + 1}\n{text}" for number, text in enumerate(below))
        else:
            yield f"{pad}{key}: {f'{below:,}' if isinstance(below, int) else below}"


def _show_rejections(console: Console, rejected: list[Rejection]) -> None:
    if not rejected:
        return
    console.print(f"{len(rejected)} inputs were rejected:")
    for rejection in rejected[:_SHOWN_REJECTIONS]:
        console.print(f"  {rejection.name}: {rejection.reason}", markup=False)
    if len(rejected) > _SHOWN_REJECTIONS:
        console.print(f"  and {len(rejected) - _SHOWN_REJECTIONS} more")
