"""Processes share one bounded cache: nothing is fetched twice, nothing is seen half written, nothing is lost."""

import io
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import FaultyServer, http_server

from triplane.data.cache import Cache, _locked
from triplane.data.corpus import Corpus
from triplane.data.manifest import Manifest, StoredFile
from triplane.data.prefetch import Prefetcher
from triplane.data.shards import write_shard
from triplane.storage.errors import DataError, StorageError
from triplane.storage.remote import Retry

_FORK = multiprocessing.get_context("fork")
_RETRY = Retry(retries=3, timeout_s=2, first_wait_s=0.01)
_SHARDS = 12
_SHARD_TOKENS = 100_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards of 100,000 random tokens."""
    folder = tmp_path_factory.mktemp("shards")
    draw = np.random.default_rng(0)
    lengths = np.full(200, _SHARD_TOKENS // 200, np.uint32)
    shards = []
    for number in range(_SHARDS):
        tokens = io.BytesIO(draw.integers(0, 60_000, _SHARD_TOKENS, np.uint16).tobytes())
        shards.append(write_shard(folder, number, tokens=tokens, lengths=lengths, dtype=np.dtype(np.uint16)))
    manifest = Manifest(tokenizer_digest="0" * 64, vocab_size=60_000, bos_id=1, text_bytes=1, shards=tuple(shards))
    manifest.save(folder)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FaultyServer]:
    with http_server(folder) as server:
        yield server


def _cache(tmp_path: Path, shards: float = _SHARDS + 1) -> Cache:
    return Cache(tmp_path / "cache", int(shards * 2.2 * _SHARD_TOKENS), _RETRY)


def _content(corpus: Corpus) -> bytes:
    return b"".join(
        corpus.read(start, min(1000, corpus.tokens - start))[0].tobytes() for start in range(0, corpus.tokens, 1000)
    )


def _in_processes(count: int, function: Any, *args: Any) -> list[Any]:
    """Returns the results of `function(number, *args)` in `count` concurrent processes."""
    with _FORK.Pool(count) as pool:
        answers = [pool.apply_async(function, (number, *args)) for number in range(count)]
        return [answer.get(60) for answer in answers]


def _used(cache: Cache) -> int:
    """Bytes of its files at a moment when none is added or removed, each counted once if it is renamed meanwhile."""
    with _locked(cache.folder / ".room.lock"):
        sizes = {}
        for path in cache.folder.iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                sizes[found.st_ino] = found.st_size
        return sum(sizes.values())


def _read_all(number: int, url: str, cache: Cache) -> bytes:
    corpus = Corpus(url, cache)
    if number:  # each process begins elsewhere
        corpus.read(number * corpus.tokens // 3, 10)
    return _content(corpus)


def test_processes_fetch_each_file_once(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    contents = _in_processes(3, _read_all, server.url, cache)
    assert contents == [_content(Corpus(folder))] * 3
    assert server.requests.pop("manifest.json") == 3
    assert len(server.requests) == 2 * _SHARDS and set(server.requests.values()) == {1}
    names = {path.name for path in cache.folder.iterdir()}
    assert len(names) == 2 * _SHARDS and all(re.fullmatch("[0-9a-f]{64}", name) for name in names)


def test_twenty_kills_leave_no_partial_file(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    server.bytes_per_s = 2e6  # 0.1 s a shard
    draw = random.Random(0)
    hashes = {file.sha256: file for shard in Corpus(folder).manifest.shards for file in (shard.data, shard.index)}
    left_behind = 0
    for _ in range(20):
        victim = _FORK.Process(target=_read_all, args=(0, server.url, cache))
        requests = server.requests.total()
        victim.start()
        assert victim.pid is not None
        while server.requests.total() < requests + 2:  # the manifest and a first file
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.12))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        for path in cache.folder.glob("[!.]*"):
            assert StoredFile.of(path) == hashes[path.name].model_copy(update={"name": path.name})
        left_behind += any(cache.folder.glob(".*.tmp"))
    assert left_behind > 5
    server.bytes_per_s = None
    assert _content(Corpus(server.url, cache)) == _content(Corpus(folder))
    assert len(list(cache.folder.glob("[!.]*"))) == 2 * _SHARDS


def test_a_waiting_process_takes_over_from_a_killed_one(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path)
    server.bytes_per_s = 5e5  # 0.4 s a shard
    victim = _FORK.Process(target=_read_all, args=(0, server.url, cache))
    victim.start()
    while not list(cache.folder.glob(".*.tmp")):
        time.sleep(0.001)
    with _FORK.Pool(1) as pool:
        answer = pool.apply_async(_read_all, (0, server.url, cache))
        time.sleep(0.1)
        server.bytes_per_s = None
        victim.kill()
        assert answer.get(10) == _content(Corpus(folder))
    victim.join()


def _stream(number: int, url: str, cache: Cache) -> tuple[bytes, int]:
    """The content, and the most that the cache held."""
    corpus = Corpus(url, cache)
    parts, most = [], 0
    for start in range(0, corpus.tokens, 1000):
        parts.append(corpus.read(start, 1000)[0].tobytes())
        most = max(most, _used(cache))
    return b"".join(parts), most


@pytest.mark.parametrize("shards", [1.1, 3, 5])
def test_the_bound_is_kept_while_more_streams_through(
    folder: Path, server: FaultyServer, tmp_path: Path, shards: float
) -> None:
    cache = _cache(tmp_path, shards)
    (bystander := tmp_path / "cache" / "notes.txt").parent.mkdir()
    bystander.write_text("")
    (cache.folder / f".{'0' * 64}.tmp").write_bytes(bytes(_SHARD_TOKENS))  # of a process killed long ago
    results = _in_processes(3, _stream, server.url, cache)
    assert [content for content, _ in results] == [_content(Corpus(folder))] * 3
    assert max(most for _, most in results) <= cache.limit_bytes
    assert bystander.exists()


def test_space_of_evicted_shards_is_given_back(server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path, 2)
    corpus = Corpus(server.url, cache)
    _content(corpus)
    mapped = Path("/proc/self/maps").read_text().splitlines()
    unnamed = [line for line in mapped if str(cache.folder) in line and line.endswith("(deleted)")]
    assert len(unnamed) <= 1


def test_a_file_larger_than_the_cache_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    corpus = Corpus(server.url, _cache(tmp_path, 0.5))
    with pytest.raises(DataError, match=r"^\S+: a file of [\d,]+ bytes does not fit into .*: raise data\.cache_gib$"):
        corpus.read(0, 10)


def test_shards_of_a_read(folder: Path) -> None:
    corpus = Corpus(folder)
    n = _SHARD_TOKENS
    assert corpus.shards_of(np.array([0]), n) == [0]
    assert corpus.shards_of(np.array([n - 1, 5 * n]), 2) == [0, 1, 5]
    assert corpus.shards_of(np.array([n // 2]), 2 * n) == [0, 1, 2]
    assert corpus.shards_of(np.array([corpus.tokens - 1]), 100) == [_SHARDS - 1]


def _endless() -> Iterator[list[int]]:
    """Steps of two shards, of which the next step reads one again."""
    step = 0
    while True:
        yield [step % _SHARDS, (step + 1) % _SHARDS]
        step += 1


def _budget(corpus: Corpus, shards: float) -> int:
    first = corpus.manifest.shards[0]
    return int(shards * (first.data.bytes + first.index.bytes) * 1.001)


def test_the_prefetcher_stays_ahead_within_its_budget(server: FaultyServer, tmp_path: Path) -> None:
    corpus = Corpus(server.url, _cache(tmp_path))
    with Prefetcher(corpus, _endless(), _budget(corpus, 4)) as prefetcher:
        for step in range(5):
            prefetcher.next_step()
            assert {f"shard-{step:06d}.tar", f"shard-{step + 1:06d}.tar"} <= set(server.requests)
            deadline = time.monotonic() + 5
            while len(server.requests) < 1 + 2 * (step + 4) and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(0.02)  # enough for one too many
            assert len(server.requests) == 1 + 2 * (step + 4)
    assert not prefetcher._thread.is_alive()
    assert set(server.requests.values()) == {1}


def _train(number: int, url: str, cache: Cache, steps: int, together: threading.Barrier) -> bytes:
    corpus = Corpus(url, cache)
    parts = []
    plan: Iterable[list[int]] = islice(_endless(), steps)
    with Prefetcher(corpus, plan, cache.limit_bytes // 3) as prefetcher:
        for shards in islice(_endless(), steps):
            together.wait(20)  # as an all-reduce does
            prefetcher.next_step()
            parts += [corpus.read(shard * _SHARD_TOKENS + number, 100)[0].tobytes() for shard in shards]
    return b"".join(parts)


def test_ranks_prefetch_together_through_a_small_cache(folder: Path, server: FaultyServer, tmp_path: Path) -> None:
    cache = _cache(tmp_path, 9)
    steps = _SHARDS - 1
    with _FORK.Manager() as manager:
        contents = _in_processes(3, _train, server.url, cache, steps, manager.Barrier(3))
    local = Corpus(folder)
    for number, content in enumerate(contents):
        assert content == b"".join(
            local.read(shard * _SHARD_TOKENS + number, 100)[0].tobytes()
            for shards in islice(_endless(), steps)
            for shard in shards
        )
    assert server.requests.pop("manifest.json") == 3
    assert set(server.requests.values()) == {1}


def test_a_step_larger_than_the_budget_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    corpus = Corpus(server.url, _cache(tmp_path))
    message = r"a step reads 2 shards of \S+ GiB in total, more than this process's \S+ GiB .*: raise data\.cache_gib"
    with (
        pytest.raises(DataError, match=message),
        Prefetcher(corpus, _endless(), _budget(corpus, 1.5)) as prefetcher,
    ):
        prefetcher.next_step()


def test_what_the_thread_meets_reaches_the_reader(server: FaultyServer, tmp_path: Path) -> None:
    corpus = Corpus(server.url, _cache(tmp_path))
    (server.folder / "shard-000002.tar").rename(server.folder / "hidden")
    try:
        with Prefetcher(corpus, _endless(), _budget(corpus, 6)) as prefetcher:
            prefetcher.next_step()
            with pytest.raises(StorageError, match=r"shard-000002\.tar: cannot be fetched: try 1: .*try 4: "):
                prefetcher.next_step()
    finally:
        (server.folder / "hidden").rename(server.folder / "shard-000002.tar")
    assert not prefetcher._thread.is_alive()


def test_leaving_stops_a_prefetcher_that_waits(server: FaultyServer, tmp_path: Path) -> None:
    corpus = Corpus(server.url, _cache(tmp_path))
    start = time.monotonic()
    with Prefetcher(corpus, _endless(), _budget(corpus, 2)) as prefetcher:
        prefetcher.next_step()
        time.sleep(0.05)
    assert not prefetcher._thread.is_alive() and time.monotonic() - start < 5
