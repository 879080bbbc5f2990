"""Mixtures, phases and changes of length: nothing is lost, doubled or skipped, and the past never changes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triplane.data.cuts import Even, Pieces
from triplane.data.mixture import BLOCK, Mixture
from triplane.data.plan import Chunk, Phase, StoredPlan, TrainingPlan
from triplane.storage.errors import DataError

_WEIGHTS = st.lists(st.floats(0.001, 10), min_size=1, max_size=5)
_BASE = 8
_RUN_TOKENS = 16 * _BASE


def _read(mixture: Mixture, stop: int) -> tuple[list[int], list[int]]:
    sources: list[int] = []
    numbers: list[int] = []
    while len(sources) < stop:
        draw = mixture.draw(len(sources))
        assert draw.start == len(sources)
        sources += draw.sources.tolist()
        numbers += draw.numbers.tolist()
    return sources[:stop], numbers[:stop]


@settings(max_examples=40)
@given(data=st.data(), lanes=st.sampled_from([1, 4, 64]), seed=st.integers(0, 2**32))
def test_sources_are_read_without_gap_or_repeat_through_phases(data: st.DataObject, lanes: int, seed: int) -> None:
    weights = data.draw(_WEIGHTS)
    phases = [(0, weights)]
    for _ in range(data.draw(st.integers(0, 3))):
        start = phases[-1][0] + lanes * data.draw(st.integers(1, 9000 // lanes))
        phases.append((start, data.draw(st.permutations(weights))))
    stop = phases[-1][0] + data.draw(st.integers(1, 9000))
    mixture = Mixture(phases, seed, lanes)
    sources, numbers = _read(mixture, stop)
    for source in range(len(weights)):
        read = [number for s, number in zip(sources, numbers) if s == source]
        assert read == sorted(read) and read == list(range(len(read)))
        assert mixture.consumed(stop)[source] == len(read)
        if stop % lanes == 0:
            assert len(read) % lanes == 0
    # What is appended later changes nothing.
    more = Mixture([*phases, (stop + lanes - stop % lanes, weights[::-1])], seed, lanes)
    assert _read(more, stop) == (sources, numbers)


@settings(max_examples=30)
@given(weights=_WEIGHTS, block=st.integers(0, 10**9))
def test_counts_are_exact_and_never_drift(weights: list[float], block: int) -> None:
    mixture = Mixture([(0, weights)], 0, 1)
    cycle = BLOCK << 12
    shares = mixture.consumed(cycle)
    assert shares.sum() == cycle and (abs(shares - np.array(weights) / sum(weights) * cycle) < 1).all()
    start = block * BLOCK
    before, after = mixture.consumed(start), mixture.consumed(start + BLOCK)
    assert after.sum() - before.sum() == BLOCK
    assert (abs((after - before) - shares / 4096) < 1).all()
    assert (abs(before - shares * (start / cycle)) < 13).all()


def test_a_source_added_with_weight_0_changes_nothing() -> None:
    assert _read(Mixture([(0, [1, 2])], 3, 1), 9000) == _read(Mixture([(0, [1, 2, 0]), (9000, [1, 1, 1])], 3, 1), 9000)


def test_a_weight_that_would_never_be_read_is_refused() -> None:
    with pytest.raises(DataError, match=r"^data: weight 1e-09 of source 2 is less than 1 / 16777216 of their sum"):
        Mixture([(0, [1, 1e-9])], 0, 1)


def _plan(
    tokens: list[int], phases: list[tuple[int, list[float], int]], seed: int = 0, window_runs: int = 2
) -> TrainingPlan:
    built = [
        Phase(
            start=start, weights=weights, cuts=[Even(count, seq_len, _RUN_TOKENS) for count in tokens], seq_len=seq_len
        )
        for start, weights, seq_len in phases
    ]
    return TrainingPlan(built, seed, window_runs=window_runs, lanes=1)


def _sequences(plan: TrainingPlan, stop: int) -> list[tuple[int, int, Pieces]]:
    chunk = Chunk(start=0, stop=0, seq_len=0, sources=[], pieces=[])
    found = []
    for position in range(stop):
        if position >= chunk.stop:
            chunk = plan.chunk(position)
        at = position - chunk.start
        found.append((chunk.seq_len, chunk.sources[at], chunk.pieces[at]))
    return found


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_every_epoch_has_each_target_once_through_changes_of_length(data: st.DataObject, seed: int) -> None:
    tokens = data.draw(st.lists(st.integers(2, 1500), min_size=1, max_size=3))
    weights = [1.0] * len(tokens)
    phases = [(0, weights, _BASE)]
    for seq_len in data.draw(st.lists(st.sampled_from([2, 8, 32, 128]), max_size=2)):
        phases.append((phases[-1][0] + data.draw(st.integers(1, 700)), weights, seq_len))
    try:
        plan = _plan(tokens, phases, seed)
    except DataError as error:
        if "is finished: change it" not in str(error):
            raise
        return
    stop = phases[-1][0] + 600
    found = _sequences(plan, stop)
    for source, count in enumerate(tokens):
        read: Counter[int] = Counter()
        for seq_len, s, pieces in found:
            assert sum(targets for _, targets in pieces) <= seq_len and all(targets > 0 for _, targets in pieces)
            if s == source:
                for start, targets in pieces:
                    read.update(range(start, start + targets))
                    # An epoch is over before the next one begins.
                whole = min(read[target] for target in range(count - 1))
                assert max(read.values(), default=0) <= whole + 1
        epochs = plan.epochs(stop)[source]
        assert set(read.values()) <= {int(epochs), int(epochs) + 1}
    assert _sequences(_plan(tokens, [*phases, (stop, weights, phases[-1][2])], seed), stop) == found


def test_after_its_window_a_changed_length_is_read_in_one_piece() -> None:
    plan = _plan([100 * _RUN_TOKENS + 1], [(0, [1.0], 8), (40, [1.0], 64)])
    found = _sequences(plan, 100)
    assert [len(pieces) for _, _, pieces in found[:40]] == [1] * 40
    # The window has 32 sequences of 8; 24 are left of the second one and make 3 of 64.
    assert [len(pieces) for _, _, pieces in found[40:100]] == [8] * 3 + [1] * 57
    assert all(pieces[0][1] == 64 for _, _, pieces in found[43:])


def test_a_length_that_changes_again_at_once_is_refused_with_the_reason() -> None:
    with pytest.raises(
        DataError, match=r"^data\.phases: seq_len changes to 8 at sequence 42 of a source, .* 1 sequences"
    ):
        _plan([100 * _RUN_TOKENS], [(0, [1.0], 8), (40, [1.0], 64), (42, [1.0], 8)])


def test_10_to_the_12_sequences_need_no_table() -> None:
    cuts = [Even(10**12 * 2048, 2048, 64 * 2048)] * 2
    phase = Phase(start=0, weights=[1, 2], cuts=cuts, seq_len=2048)
    plan = TrainingPlan([phase], 0, window_runs=64, lanes=1)
    chunk = plan.chunk(10**12)
    assert chunk.start <= 10**12 < chunk.stop and len(chunk.pieces) == BLOCK
    assert len(set(chunk.pieces)) == BLOCK


@given(sizes=st.lists(st.integers(2, 40), min_size=1, max_size=4))
def test_stored_order_takes_the_sources_by_turns_and_ends_empty(sizes: list[int]) -> None:
    cuts = [Even(tokens, 4, 4) for tokens in sizes]
    plan = StoredPlan(cuts, 4)
    chunk = plan.chunk(0)
    found = list(zip(chunk.sources, chunk.pieces))
    assert all(pieces == () for _, pieces in found[plan.n_sequences :])
    read = found[: plan.n_sequences]
    for source, cut in enumerate(cuts):
        assert [pieces[0][0] for s, pieces in read if s == source] == [4 * i for i in range(cut.n_sequences)]
    assert [source for source, _ in read[: len(sizes)]] == list(range(len(sizes)))
