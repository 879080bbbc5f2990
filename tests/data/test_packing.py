"""Best-fit packing cuts no document that fits, reads each target once, and its plan is a checked file."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_corpora import Prepared

from triplane.data.packing import pack, packing
from triplane.storage.errors import DataError


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80), seq_len=st.integers(1, 40))
def test_no_document_that_fits_is_cut_and_each_target_is_there_once(lengths: list[int], seq_len: int) -> None:
    sequences = pack(np.array(lengths, np.uint32), seq_len)
    pieces = sorted(piece for sequence in sequences for piece in sequence)
    assert all(0 < sum(count for _, count in sequence) <= seq_len for sequence in sequences)
    expected = []
    for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths):
        for first in range(0, length - 1, seq_len):
            expected.append((start + first, min(seq_len, length - 1 - first)))
    assert pieces == expected
    # No two sequences fit into one.
    by_fill = sorted(sum(count for _, count in sequence) for sequence in sequences)
    assert len(by_fill) < 2 or by_fill[0] + by_fill[1] > seq_len


def test_the_plan_is_written_once_and_checked(prepared: Prepared, tmp_path: Path) -> None:
    corpus = prepared.train
    plan = packing(corpus, 256, run=4, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    pieces = plan.pieces(np.arange(plan.n_sequences))
    assert sum(count for sequence in pieces for _, count in sequence) == corpus.tokens - corpus.documents
    assert 0 < plan.padding < 0.05
    assert packing(corpus, 256, run=4, folder=tmp_path).pieces(np.arange(plan.n_sequences)) == pieces
    path.unlink()
    packing(corpus, 256, run=4, folder=tmp_path)
    assert path.read_bytes() == content
    damaged = bytearray(content)
    damaged[-9] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=rf"^{path}: damaged: .* remove it; it will be rebuilt$"):
        packing(corpus, 256, run=4, folder=tmp_path)
