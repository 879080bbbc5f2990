"""Describes the content of a prepared corpus."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triplane.data.corpus import Corpus
from triplane.data.plan import Plan
from triplane.data.tokenizer import Tokenizer
from triplane.storage.errors import DataError

_PERCENTILES = (0, 10, 50, 90, 99, 100)


def describe(folder: Path, show_documents: int = 0) -> dict[str, Any]:
    """Returns counts, digests and document lengths of each split of the corpus that `prepare` wrote to `folder`.

    Includes the text of the first `show_documents` documents of each split. Raises DataError if a file is missing,
    damaged or from another tokenizer.
    """
    train, validation = Corpus.open_splits(folder)
    tokenizer = train.open_tokenizer()
    if validation.tokenizer_digest != tokenizer.digest:
        raise DataError(f"{folder}: its splits were tokenized with different tokenizers: prepare the corpus again")
    return {
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "train": _describe_split(train, tokenizer, show_documents),
        "validation": _describe_split(validation, tokenizer, show_documents),
    }


def _describe_split(corpus: Corpus, tokenizer: Tokenizer, show_documents: int) -> dict[str, Any]:
    lengths = corpus.document_lengths()
    percentiles = np.percentile(lengths, _PERCENTILES, method="nearest")
    description = {
        "digest": corpus.digest,
        "documents": corpus.documents,
        "tokens": corpus.tokens,
        "shards": len(corpus.manifest.shards),
        "stored_bytes": sum(shard.data.bytes for shard in corpus.manifest.shards),
        "text_bytes": corpus.manifest.text_bytes,
        "bytes_per_token": corpus.manifest.text_bytes / corpus.tokens,
        "document_tokens_percentiles": dict(zip(_PERCENTILES, percentiles.tolist())),
    }
    if show_documents:
        ends = np.cumsum(lengths[:show_documents], dtype=np.int64)
        tokens, starts = corpus.read(0, int(ends[-1]))
        description["first_documents"] = [tokenizer.decode(part.tolist()) for part in np.split(tokens, starts)]
    return description


def describe_batch(
    plan: Plan, *, names: Sequence[str], corpora: Sequence[Corpus], tokenizer: Tokenizer, positions: Sequence[int]
) -> Iterator[str]:
    """Yields lines on each of `positions`: its documents, where they are stored, and their text."""
    for position in positions:
        chunk = plan.chunk(position)
        offset = position - chunk.start
        source, pieces = chunk.sources[offset], chunk.pieces[offset]
        padding = chunk.seq_len - sum(count for _, count in pieces)
        yield f"== sequence {position:,}: {names[source]}" + (f", {padding:,} of padding" if padding else "")
        for start, count in pieces:
            # One token more than is predicted from: the last one is only a target.
            for part in corpora[source].parts(start, count + 1):
                length = part.stop - part.start
                yield f"-- {part.shard}, document {part.document:,}, tokens {part.start:,} to {part.stop:,}"
                yield tokenizer.decode(corpora[source].view(start, length).tolist())
                start += length
