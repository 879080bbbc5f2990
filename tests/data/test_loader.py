"""Ranks, workers and interruptions divide the reading and never change what is read."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpora import Prepared

from triplane.data.baseline import unigram_loss
from triplane.data.corpus import Corpus
from triplane.data.errors import DataError
from triplane.data.loader import (
    IGNORED_TARGET,
    MicroBatch,
    Sequence,
    SequenceDataset,
    batches,
    collate,
    count_sequences,
)
from triplane.data.order import Order

_SEQ_LEN = 64
_GLOBAL_BATCH = 24


def _dataset(corpus: Corpus, shuffled: bool = True, document_mask: bool = True) -> SequenceDataset:
    order = Order(count_sequences(corpus.tokens, _SEQ_LEN), seed=5, window=100) if shuffled else None
    return SequenceDataset(corpus, order, _SEQ_LEN, document_mask)


def _steps(
    dataset: SequenceDataset, consumed: int, steps: int, micro: int = 1, dp_size: int = 1, num_workers: int = 0
) -> list[MicroBatch]:
    """The global batch of each step, put together from what each rank reads."""
    ranks = [
        list(
            batches(
                dataset,
                consumed_sequences=consumed,
                steps=steps,
                global_batch_size=_GLOBAL_BATCH,
                micro_batch_size=micro,
                dp_rank=rank,
                dp_size=dp_size,
                num_workers=num_workers,
            )
        )
        for rank in range(dp_size)
    ]
    a_step = _GLOBAL_BATCH // dp_size // micro
    assert all(len(rank) == steps * a_step for rank in ranks)
    return [
        _join([batch for rank in ranks for batch in rank[step * a_step : (step + 1) * a_step]]) for step in range(steps)
    ]


def _join(parts: list[MicroBatch]) -> MicroBatch:
    as_sequences = [Sequence(part.tokens_T.numpy(), part.targets_T.numpy(), part.bounds) for part in parts]
    return collate(as_sequences)


def _assert_equal(some: list[MicroBatch], others: list[MicroBatch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others):
        assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.targets_T, b.targets_T) and a.bounds == b.bounds


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_sequence_by_hand(prepared: Prepared, document_mask: bool) -> None:
    corpus = prepared.train
    stored, starts = corpus.read(0, corpus.tokens)
    starts_of_documents = {0, *starts.tolist()}
    dataset = _dataset(corpus, shuffled=False, document_mask=document_mask)
    for i in range(len(dataset)):
        tokens, targets, bounds = dataset[i]
        assert tokens.dtype == targets.dtype == np.int64 and tokens.shape == targets.shape == (_SEQ_LEN,)
        inner = []
        for j in range(_SEQ_LEN):
            at = i * _SEQ_LEN + j
            if at + 1 >= len(stored):
                assert (tokens[j], targets[j]) == (0, IGNORED_TARGET)
                continue
            assert tokens[j] == stored[at]
            is_masked = document_mask and at + 1 in starts_of_documents
            assert targets[j] == (IGNORED_TARGET if is_masked else stored[at + 1])
            if document_mask and j > 0 and at in starts_of_documents:
                inner.append(j)
        padding = len(stored) - 1 - i * _SEQ_LEN
        if document_mask and padding < _SEQ_LEN:
            inner.append(padding)
        assert bounds == (0, *inner, _SEQ_LEN)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 10**6])
def test_each_token_but_the_first_is_a_target_once(prepared: Prepared, seq_len: int) -> None:
    corpus = prepared.validation
    dataset = SequenceDataset(corpus, None, seq_len, document_mask=False)
    targets = np.concatenate([dataset[i].targets for i in range(len(dataset))])
    assert targets[targets != IGNORED_TARGET].tolist() == corpus.read(0, corpus.tokens)[0][1:].tolist()


def test_an_epoch_is_each_sequence_once_in_another_order(prepared: Prepared) -> None:
    shuffled, stored = _dataset(prepared.train), _dataset(prepared.train, shuffled=False)
    n = len(stored)
    every = [stored[i].tokens.tobytes() for i in range(n)]
    epochs = [[shuffled[p].tokens.tobytes() for p in range(e * n, (e + 1) * n)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(every)
    assert len({tuple(epochs[0]), tuple(epochs[1]), tuple(every)}) == 3


def test_past_the_end_of_stored_order_nothing_is_counted(prepared: Prepared) -> None:
    dataset = _dataset(prepared.validation, shuffled=False)
    tokens, targets, bounds = dataset[len(dataset) + 3]
    assert not tokens.any() and (targets == IGNORED_TARGET).all() and bounds == (0, _SEQ_LEN)


def test_ranks_workers_and_resumption_change_nothing(prepared: Prepared) -> None:
    dataset = _dataset(prepared.train)
    steps = 2 * len(dataset) // _GLOBAL_BATCH  # into the second epoch
    whole = _steps(dataset, consumed=0, steps=steps)
    parts = [
        _steps(dataset, 0, steps=4, micro=3, dp_size=4, num_workers=2),
        _steps(dataset, 4 * _GLOBAL_BATCH, steps=5, micro=2, dp_size=3, num_workers=1),
        _steps(_dataset(prepared.train), 9 * _GLOBAL_BATCH, steps=steps - 9, micro=3, dp_size=8, num_workers=0),
    ]
    _assert_equal([step for part in parts for step in part], whole)
    assert len({step.tokens_T.numpy().tobytes() for step in whole}) == steps


def test_a_step_is_the_positions_of_that_step(prepared: Prepared) -> None:
    dataset = _dataset(prepared.train)
    far = 10**12
    (step,) = _steps(dataset, consumed=far, steps=1, micro=4, dp_size=2)
    _assert_equal([step], [collate([dataset[far + i] for i in range(_GLOBAL_BATCH)])])


def test_the_environment_of_a_rank_changes_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _steps(_dataset(prepared.train), 0, steps=2, micro=8)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "WORKER": "1", "NUM_WORKERS": "4"}.items():
        monkeypatch.setenv(name, value)
    _assert_equal(_steps(_dataset(prepared.train), 0, steps=2, micro=8, num_workers=1), plain)


def test_loading_leaves_the_global_generator_alone(prepared: Prepared) -> None:
    before = torch.get_rng_state()
    _steps(_dataset(prepared.train), 0, steps=1, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_keeps_sequences_apart(prepared: Prepared) -> None:
    dataset = _dataset(prepared.train)
    sequences = [dataset[i] for i in range(3)]
    batch = collate(sequences)
    assert batch.tokens_T.dtype == torch.int64 and batch.tokens_T.shape == (3 * _SEQ_LEN,)
    for i, sequence in enumerate(sequences):
        part = slice(i * _SEQ_LEN, (i + 1) * _SEQ_LEN)
        assert batch.tokens_T[part].tolist() == sequence.tokens.tolist()
        assert batch.targets_T[part].tolist() == sequence.targets.tolist()
        assert tuple(b - part.start for b in batch.bounds if part.start <= b <= part.stop) == sequence.bounds


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_stops_the_loader_with_one_line(prepared: Prepared, tmp_path: Path, num_workers: int) -> None:
    folder = shutil.copytree(prepared.folder / "train", tmp_path / "train")
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 1
    shard.write_bytes(content)
    dataset = _dataset(Corpus(folder))
    with pytest.raises(DataError, match=r"^\S+shard-000000\.tar: bytes \d+ to \d+: damaged: .*again$"):
        _steps(dataset, 0, steps=len(dataset) // _GLOBAL_BATCH, num_workers=num_workers)


def test_unigram_loss_by_hand(prepared: Prepared) -> None:
    counts = dict.fromkeys(range(prepared.tokenizer.vocab_size), 1)
    for token in prepared.train.read(0, prepared.train.tokens)[0].tolist():
        counts[token] += token != prepared.tokenizer.bos_id
    total = sum(counts.values())
    targets = [t for t in prepared.validation.read(0, prepared.validation.tokens)[0].tolist() if t != 1]
    expected = -sum(math.log(counts[token] / total) for token in targets) / len(targets)
    assert unigram_loss(prepared.train, prepared.validation) == pytest.approx(expected, rel=1e-12)
