"""Computes the unigram loss: that of a model that knows only token frequencies, which training must beat."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from triplane.data.corpus import Corpus

_CHUNK_TOKENS = 1 << 22


def unigram_loss(train: Sequence[Corpus], validation: Sequence[Corpus], *, most_tokens: int | None = None) -> float:
    """Returns nats per validation target under the add-one-smoothed token frequencies of `train`.

    The first token of a document is not a target and counts in neither. Reads at most `most_tokens` of each corpus.
    """
    assert len({corpus.tokenizer_digest for corpus in (*train, *validation)}) == 1
    counts = 1 + sum(_count_targets(corpus, most_tokens) for corpus in train)
    targets = sum(_count_targets(corpus, most_tokens) for corpus in validation)
    assert isinstance(counts, np.ndarray) and isinstance(targets, np.ndarray)
    log_probabilities = np.log(counts / counts.sum())
    return float(-(targets @ log_probabilities) / targets.sum())


def _count_targets(corpus: Corpus, most_tokens: int | None) -> NDArray[np.int64]:
    counts = np.zeros(corpus.vocab_size, np.int64)
    total = min(corpus.tokens, most_tokens or corpus.tokens)
    documents = 1
    for start in range(0, total, _CHUNK_TOKENS):
        tokens, starts = corpus.read(start, min(_CHUNK_TOKENS, total - start))
        counts += np.bincount(tokens, minlength=corpus.vocab_size)
        documents += len(starts)
    counts[corpus.manifest.bos_id] -= corpus.documents if total == corpus.tokens else documents
    return counts
