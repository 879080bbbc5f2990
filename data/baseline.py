"""Computes the unigram loss: that of a model that knows only token frequencies, which training must beat."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from triplane.data.corpus import Corpus

_CHUNK_TOKENS = 1 << 22


def unigram_loss(train: Sequence[Corpus], validation: Sequence[Corpus]) -> float:
    """Returns nats per validation target under the add-one-smoothed token frequencies of `train`.

    The first token of a document is not a target and counts in neither.
    """
    assert len({corpus.tokenizer_digest for corpus in (*train, *validation)}) == 1
    counts = 1 + sum(map(_count_targets, train))
    targets = sum(map(_count_targets, validation))
    assert isinstance(counts, np.ndarray) and isinstance(targets, np.ndarray)
    log_probabilities = np.log(counts / counts.sum())
    return float(-(targets @ log_probabilities) / targets.sum())


def _count_targets(corpus: Corpus) -> NDArray[np.int64]:
    counts = np.zeros(corpus.vocab_size, np.int64)
    for start in range(0, corpus.tokens, _CHUNK_TOKENS):
        tokens, _ = corpus.read(start, min(_CHUNK_TOKENS, corpus.tokens - start))
        counts += np.bincount(tokens, minlength=corpus.vocab_size)
    counts[corpus.manifest.bos_id] -= corpus.documents
    return counts
