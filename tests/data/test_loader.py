"""Ranks, workers and interruptions divide the reading and never change what is read."""

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import FaultyServer
from small_corpora import Prepared

from triplane.data.baseline import unigram_loss
from triplane.data.cache import Cache
from triplane.data.config import DataConfig
from triplane.data.corpus import Corpus
from triplane.data.cuts import Even
from triplane.data.loader import IGNORED_TARGET, MicroBatch, SequenceDataset, batches
from triplane.data.opening import training_plan, validation_plan
from triplane.data.plan import StoredPlan
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.forked import run_ranks
from triplane.storage.errors import DataError
from triplane.storage.remote import Retry

_SEQ_LEN = 64
_GLOBAL_BATCH = 24


def _config(**changes: object) -> DataConfig:
    values = {"sources": [{"corpus": "a"}], "seq_len": _SEQ_LEN, "shuffle_window": 64, **changes}
    config = DataConfig.model_validate(values)
    assert not list(config.problems())
    return config


def _dataset(*corpora: Corpus, run_dir: Path = Path(), **changes: object) -> SequenceDataset:
    config = _config(**changes)
    return SequenceDataset(corpora, training_plan(config, corpora, 5, run_dir), config.document_mask)


def _stored(*corpora: Corpus, **changes: object) -> SequenceDataset:
    config = _config(**changes)
    return SequenceDataset(corpora, validation_plan(config, corpora), config.document_mask)


def _mixed(prepared: Prepared, run_dir: Path = Path(), **changes: object) -> SequenceDataset:
    """Two sources; the second one joins later. The length changes twice when they are concatenated."""
    lengths = (None, None) if "packing" in changes else (256, 32)
    return _dataset(
        prepared.train,
        prepared.validation,
        run_dir=run_dir,
        sources=[{"corpus": "a"}, {"corpus": "b", "weight": 0}],
        phases=[
            {"from_sequence": 4 * _GLOBAL_BATCH, "weights": [0.7, 0.3], "seq_len": lengths[0]},
            {"from_sequence": 12 * _GLOBAL_BATCH, "weights": [1, 3], "seq_len": lengths[1]},
        ],
        **changes,
    )


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
    return _join_ranks(ranks, steps, micro)


def _join_ranks(ranks: list[list[MicroBatch]], steps: int, micro: int) -> list[MicroBatch]:
    a_step = _GLOBAL_BATCH // len(ranks) // micro
    assert all(len(rank) == steps * a_step for rank in ranks)
    joined = []
    for step in range(steps):
        by_rank = [
            [one for batch in rank[step * a_step : (step + 1) * a_step] for one in _split(batch, micro)]
            for rank in ranks
        ]
        joined.append(_join([sequence for turn in zip(*by_rank) for sequence in turn]))
    return joined


def _split(batch: MicroBatch, sequences: int) -> list[MicroBatch]:
    size = len(batch.tokens_T) // sequences
    return [
        MicroBatch(
            batch.tokens_T[i * size : (i + 1) * size],
            batch.targets_T[i * size : (i + 1) * size],
            tuple(b - i * size for b in batch.bounds if i * size <= b <= (i + 1) * size),
            sequences=1,
        )
        for i in range(sequences)
    ]


def _join(parts: list[MicroBatch]) -> MicroBatch:
    bounds = [0]
    for part in parts:
        shift = bounds[-1]
        bounds += [shift + bound for bound in part.bounds[1:]]
    tokens_T, targets_T = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens_T", "targets_T"))
    return MicroBatch(tokens_T, targets_T, tuple(bounds), sum(part.sequences for part in parts))


def _assert_equal(some: list[MicroBatch], others: list[MicroBatch]) -> None:
    assert len(some) == len(others)
    for a, b in zip(some, others):
        assert torch.equal(a.tokens_T, b.tokens_T) and torch.equal(a.targets_T, b.targets_T) and a.bounds == b.bounds


@pytest.mark.parametrize("document_mask", [True, False])
def test_a_sequence_by_hand(prepared: Prepared, document_mask: bool) -> None:
    corpus = prepared.train
    stored, starts = corpus.read(0, corpus.tokens)
    starts_of_documents = {0, *starts.tolist()}
    dataset = _stored(corpus, document_mask=document_mask)
    for i in range(len(dataset)):
        batch = dataset[[i]]
        tokens, targets = batch.tokens_T, batch.targets_T
        assert tokens.dtype == targets.dtype == torch.int64 and tokens.shape == targets.shape == (_SEQ_LEN,)
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
        if padding < _SEQ_LEN:
            inner.append(padding)
        assert batch.bounds == (0, *inner, _SEQ_LEN)


@pytest.mark.parametrize("seq_len", [1, 7, 64, 10**6])
def test_each_token_but_the_first_is_a_target_once(prepared: Prepared, seq_len: int) -> None:
    corpus = prepared.validation
    dataset = _stored(corpus, seq_len=seq_len, document_mask=False)
    targets = torch.cat([dataset[[i]].targets_T for i in range(len(dataset))])
    assert targets[targets != IGNORED_TARGET].tolist() == corpus.read(0, corpus.tokens)[0][1:].tolist()


def test_an_epoch_is_each_sequence_once_in_another_order(prepared: Prepared) -> None:
    shuffled, stored = _dataset(prepared.train), _stored(prepared.train)
    n = len(stored)
    every = [stored[[i]].tokens_T.numpy().tobytes() for i in range(n)]
    epochs = [[shuffled[[p]].tokens_T.numpy().tobytes() for p in range(e * n, (e + 1) * n)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(every)
    assert len({tuple(epochs[0]), tuple(epochs[1]), tuple(every)}) == 3


def test_past_the_end_of_stored_order_nothing_is_counted(prepared: Prepared) -> None:
    dataset = _stored(prepared.validation)
    batch = dataset[[len(dataset) + 3]]
    assert not batch.tokens_T.any() and (batch.targets_T == IGNORED_TARGET).all() and batch.bounds == (0, _SEQ_LEN)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_ranks_workers_and_resumption_change_nothing(prepared: Prepared, tmp_path: Path, packing: str) -> None:
    changes = {} if packing == "concatenate" else {"packing": packing}
    dataset = _mixed(prepared, tmp_path, **changes)
    steps = 20
    whole = _steps(dataset, consumed=0, steps=steps)
    parts = [
        _steps(dataset, 0, steps=4, micro=3, dp_size=4, num_workers=2),
        _steps(dataset, 4 * _GLOBAL_BATCH, steps=5, micro=2, dp_size=3, num_workers=1),
        _steps(_mixed(prepared, tmp_path, **changes), 9 * _GLOBAL_BATCH, steps=11, micro=3, dp_size=8),
    ]
    _assert_equal([step for part in parts for step in part], whole)
    assert len({step.tokens_T.numpy().tobytes() for step in whole}) == steps


@settings(max_examples=15)
@given(data=st.data())
def test_any_interruptions_and_layouts_change_nothing(prepared: Prepared, data: st.DataObject) -> None:
    steps, done = 16, 0
    dataset = _mixed(prepared)
    whole = _steps(dataset, 0, steps=steps)
    found: list[MicroBatch] = []
    while done < steps:
        more = data.draw(st.integers(1, steps - done))
        micro, dp_size = data.draw(st.sampled_from([(1, 1), (3, 2), (2, 3), (1, 4), (3, 8)]))
        found += _steps(_mixed(prepared), done * _GLOBAL_BATCH, more, micro, dp_size)
        done += more
    _assert_equal(found, whole)


def _read_on_a_rank(mesh: Mesh, dataset: SequenceDataset, consumed: int, steps: int, workers: int) -> list[MicroBatch]:
    return list(
        batches(
            dataset,
            consumed_sequences=consumed,
            steps=steps,
            global_batch_size=_GLOBAL_BATCH,
            micro_batch_size=1,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            num_workers=workers,
        )
    )


def test_real_ranks_4_then_3_then_8_read_what_one_reads(prepared: Prepared) -> None:
    dataset = _mixed(prepared)
    found: list[MicroBatch] = []
    for done, steps, dp_size, workers in ((0, 5, 4, 1), (5, 4, 3, 0), (9, 6, 8, 0)):
        layout = ParallelConfig(dp=dp_size)
        ranks = run_ranks(layout, dp_size, _read_on_a_rank, dataset, done * _GLOBAL_BATCH, steps, workers)
        found += _join_ranks(ranks, steps, micro=1)
    _assert_equal(found, _steps(dataset, 0, steps=15))


def test_tensor_peers_read_the_same(prepared: Prepared) -> None:
    ranks = run_ranks(ParallelConfig(dp=2, tp=2), 4, _read_on_a_rank, _mixed(prepared), 0, 2, 0)
    _assert_equal(ranks[0], ranks[1])
    _assert_equal(ranks[2], ranks[3])
    assert not torch.equal(ranks[0][0].tokens_T, ranks[2][0].tokens_T)


def test_packed_sequences_hold_whole_documents(prepared: Prepared, tmp_path: Path) -> None:
    corpus = prepared.train
    dataset = _dataset(corpus, run_dir=tmp_path, seq_len=512, packing="best_fit")
    tokens, starts = corpus.read(0, corpus.tokens)
    documents = sorted(part.tolist() for part in np.split(tokens, starts))
    assert max(map(len, documents)) <= 513
    found = []
    for position in range(len(dataset)):
        batch = dataset[[position]]
        for start, stop in pairwise(batch.bounds):
            if batch.targets_T[start] != IGNORED_TARGET:
                found.append([*batch.tokens_T[start:stop].tolist(), int(batch.targets_T[stop - 1])])
    assert sorted(found) == documents


def test_a_step_is_the_positions_of_that_step(prepared: Prepared) -> None:
    dataset = _dataset(prepared.train)
    far = 10**12
    (step,) = _steps(dataset, consumed=far, steps=1, micro=4, dp_size=2)
    _assert_equal([step], [dataset[range(far, far + _GLOBAL_BATCH)]])


def test_the_environment_of_a_rank_changes_nothing(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _steps(_dataset(prepared.train), 0, steps=2, micro=8)
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "WORKER": "1", "NUM_WORKERS": "4"}.items():
        monkeypatch.setenv(name, value)
    _assert_equal(_steps(_dataset(prepared.train), 0, steps=2, micro=8, num_workers=1), plain)


def test_loading_leaves_the_global_generator_alone(prepared: Prepared) -> None:
    before = torch.get_rng_state()
    _steps(_dataset(prepared.train), 0, steps=1, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_its_sequences_end_to_end(prepared: Prepared) -> None:
    dataset = _dataset(prepared.train)
    _assert_equal([dataset[range(3, 9)]], [_join([dataset[[i]] for i in range(3, 9)])])


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


class _CutOff:
    """Kills the worker that sends it, by which the connection breaks first."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self._broken_connection, (os.getpid(),)

    @staticmethod
    def _broken_connection(worker: int) -> None:
        threading.Timer(0.05, os.kill, (worker, signal.SIGKILL)).start()
        raise EOFError


def test_a_worker_killed_while_it_sends_is_named(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceDataset, "__getitem__", lambda dataset, positions: _CutOff())
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid \d+\) is killed by signal: Killed"):
        _steps(_dataset(prepared.train), 0, steps=2, num_workers=1)


def test_unigram_loss_by_hand(prepared: Prepared) -> None:
    counts = dict.fromkeys(range(prepared.tokenizer.vocab_size), 1)
    for token in prepared.train.read(0, prepared.train.tokens)[0].tolist():
        counts[token] += token != prepared.tokenizer.bos_id
    total = sum(counts.values())
    targets = [t for t in prepared.validation.read(0, prepared.validation.tokens)[0].tolist() if t != 1]
    expected = -sum(math.log(counts[token] / total) for token in targets) / len(targets)
    assert unigram_loss([prepared.train], [prepared.validation]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_are_fetched_ahead_and_read_the_same(workers: int, prepared: Prepared, tmp_path: Path) -> None:
    server = FaultyServer(prepared.folder)
    cache = Cache(tmp_path, 10**8, Retry(retries=0, timeout_s=10))
    remote = [Corpus(f"{server.url}/{split}", cache) for split in ("train", "validation")]
    sources = [{"corpus": "a"}, {"corpus": "b"}]
    expected = _read(_dataset(prepared.train, prepared.validation, sources=sources), workers=0)
    read = _read(_dataset(*remote, sources=sources), workers=workers)
    server.close()
    assert len(expected) == len(read) == 20 * 3
    assert all(a.tokens_T.equal(b.tokens_T) and a.bounds == b.bounds for a, b in zip(expected, read))
    assert {count for name, count in server.requests.items() if name.endswith(".tar")} == {1}


def test_a_cache_too_small_for_a_step_is_an_error(prepared: Prepared, tmp_path: Path) -> None:
    server = FaultyServer(prepared.folder)
    largest = max(shard.data.bytes for shard in prepared.train.manifest.shards)
    cache = Cache(tmp_path, 2 * largest, Retry(retries=0, timeout_s=10))
    dataset = _dataset(Corpus(f"{server.url}/train", cache))
    with pytest.raises(DataError, match=r"raise data\.cache_gib"):
        _read(dataset, workers=0, local_ranks=4)
    server.close()


def _read(dataset: SequenceDataset, workers: int, local_ranks: int = 1) -> list[MicroBatch]:
    return list(
        batches(
            dataset,
            consumed_sequences=0,
            steps=20,
            global_batch_size=_GLOBAL_BATCH,
            micro_batch_size=8,
            dp_rank=0,
            dp_size=1,
            num_workers=workers,
            local_ranks=local_ranks,
        )
    )


_READER = """
import sys
from triplane.data.corpus import Corpus
from triplane.data.cuts import Even
from triplane.data.loader import SequenceDataset, batches
from triplane.data.plan import StoredPlan
from triplane.storage.errors import DataError
corpus = Corpus(sys.argv[1])
plan = StoredPlan([Even(corpus.tokens, 512, 512)], 512)
dataset = SequenceDataset([corpus], plan, True)
choices = dict(global_batch_size=32, micro_batch_size=32, dp_rank=0, dp_size=1, num_workers=1)
try:
    list(batches(dataset, consumed_sequences=0, steps=4, **choices))
except DataError as error:
    print(error)
"""


def _read_with_shared_memory(prepared: Prepared, options: str) -> "subprocess.CompletedProcess[str]":
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"mount -t tmpfs -o {options} x /dev/shm && exec $0"]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no user mount a file system")
    mount[-1] = mount[-1].replace("$0", f"'{sys.executable}' -c '{_READER}' '{prepared.folder}/train'")
    return subprocess.run(mount, capture_output=True, text=True, timeout=120, check=False)


def test_a_worker_without_shared_memory_is_an_error(prepared: Prepared) -> None:
    done = _read_with_shared_memory(prepared, "size=64k")
    assert "set data.num_workers=0" in done.stdout and "cannot send a batch" in done.stderr, done.stderr


@pytest.mark.parametrize("options", ["ro", "size=4k,nr_inodes=1"])
def test_workers_that_cannot_start_are_an_error(options: str, prepared: Prepared) -> None:
    done = _read_with_shared_memory(prepared, options)
    assert "data workers: " in done.stdout and "/dev/shm" in done.stdout, done.stderr


@pytest.mark.parametrize("files", [40, 64])
def test_few_open_files_are_an_error_in_a_line(files: int, prepared: Prepared) -> None:
    program = _READER.replace("num_workers=1", "num_workers=8").replace("steps=4", "steps=40")
    limited = f"ulimit -n {files} && exec '{sys.executable}' -c '{program}' '{prepared.folder}/train'"
    done = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("data workers: Too many open files: raise the limit (`ulimit -n`)"), done.stderr


def test_a_worker_that_cannot_open_a_file_to_send_a_batch_is_an_error_in_a_line(prepared: Prepared) -> None:
    program = """
import multiprocessing.queues
from triplane.data import loader
start = loader._start_worker
def no_file(batch):
    raise OSError(24, "Too many open files")
def start_with_few_files(worker):
    start(worker)
    multiprocessing.queues._ForkingPickler.dumps = no_file
loader._start_worker = start_with_few_files
"""
    done = subprocess.run(
        [sys.executable, "-c", program + _READER, f"{prepared.folder}/train"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.startswith("data workers: Too many open files: raise the limit (`ulimit -n`)"), done.stderr


def test_padding_is_no_token(prepared: Prepared) -> None:
    corpus = prepared.train
    cut = Even(corpus.tokens, 1000, 1000)
    dataset = SequenceDataset([corpus], StoredPlan([cut], 1000), document_mask=True)
    assert dataset.count_tokens(range(len(dataset) + 3)) == corpus.tokens - 1
    assert dataset.count_tokens(range(2)) == 2000
