"""A corpus at a URL reads like the local one, and a bad transfer is tried again or named, never passed on."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from servers import Fault, FaultyServer, http_server, s3_server
from small_corpora import Prepared

from triplane.data.cache import Cache
from triplane.data.corpus import Corpus
from triplane.data.folder import join
from triplane.storage.errors import DataError, StorageError
from triplane.storage.remote import Retry, read_url

_RETRY = Retry(retries=3, timeout_s=0.5, first_wait_s=0.01)
_SHARD = "shard-000001.tar"
_DAMAGES: list[Fault] = ["cut", "delay", "corrupt", "longer", "drop", 503, 404]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30, _RETRY)


@pytest.fixture
def server(prepared: Prepared) -> Iterator[FaultyServer]:
    with http_server(prepared.folder) as server:
        yield server


def _assert_reads_alike(corpus: Corpus, local: Corpus) -> None:
    assert corpus.digest == local.digest
    for start in range(0, local.tokens, 997):
        count = min(997, local.tokens - start)
        tokens, starts = corpus.read(start, count)
        expected, expected_starts = local.read(start, count)
        assert tokens.tobytes() == expected.tobytes() and starts.tolist() == expected_starts.tolist()
    assert (corpus.document_lengths() == local.document_lengths()).all()
    corpus.verify()


def _put(prepared: Prepared, url: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path, exist_ok=True)
    files.put(str(prepared.folder) + "/", path, recursive=True)


def test_the_corpus_has_shards_to_fetch(prepared: Prepared) -> None:
    assert len(prepared.train.manifest.shards) >= 2


@pytest.mark.parametrize("split", ["train", "validation"])
def test_over_http_each_file_is_fetched_once(
    prepared: Prepared, server: FaultyServer, cache: Cache, split: str
) -> None:
    corpus = Corpus(f"{server.url}/{split}", cache)
    assert set(server.requests) == {f"{split}/manifest.json"}
    _assert_reads_alike(corpus, Corpus(prepared.folder / split))
    assert corpus.open_tokenizer().digest == prepared.tokenizer.digest
    files = [path.relative_to(prepared.folder) for path in (prepared.folder / split).iterdir()]
    assert server.requests == dict.fromkeys(map(str, [*files, "tokenizer.model"]), 1)


def test_s3(prepared: Prepared, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        _put(prepared, "s3://bucket/corpus")
        url = "s3://bucket/corpus/train"
        _assert_reads_alike(Corpus(url, cache), prepared.train)
        with pytest.raises(StorageError, match=r"^s3://bucket/none/manifest\.json: cannot be fetched: try 1: "):
            Corpus("s3://bucket/none", cache)
        shard = f"{url}/{_SHARD}"
        fsspec.filesystem("s3").pipe(shard, b"other".ljust(prepared.train.manifest.shards[1].data.bytes))
        empty = Cache(cache.folder / "empty", 1 << 30, _RETRY)
        with pytest.raises(StorageError, match=f"^{shard}: .*found .*damaged: restore it"):
            Corpus(url, empty).read(0, prepared.train.tokens)


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_other_protocols(prepared: Prepared, cache: Cache, tmp_path: Path, protocol: str) -> None:
    url = f"{protocol}://{tmp_path}/copy"
    _put(prepared, url)
    _assert_reads_alike(Corpus(f"{url}/train/", cache), prepared.train)


@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_bad_transfer_is_tried_again(prepared: Prepared, server: FaultyServer, cache: Cache, damage: Fault) -> None:
    server.faults = {_SHARD: deque([damage, damage])}
    _assert_reads_alike(Corpus(f"{server.url}/train", cache), prepared.train)
    assert server.requests[f"train/{_SHARD}"] == 3


@pytest.mark.parametrize(
    ("damage", "happened"),
    [
        ("cut", "Payload"),
        ("delay", "timed out"),
        ("corrupt", r"expected SHA-256 \w+, found \w+.*the file at the source is damaged: restore it"),
        ("longer", r"more than [\d,]+ bytes.*the file at the source is damaged: restore it"),
        ("drop", "Disconnected"),
        (503, "503"),
        (404, "FileNotFoundError"),
    ],
)
def test_after_the_last_try_the_error_says_what_happened(
    prepared: Prepared, server: FaultyServer, cache: Cache, damage: Fault, happened: str
) -> None:
    server.faults = {_SHARD: deque([damage] * 8)}
    corpus = Corpus(f"{server.url}/train", cache)
    with pytest.raises(StorageError, match=rf"^{server.url}/train/{_SHARD}: cannot be fetched: try 1: .*{happened}"):
        corpus.read(0, corpus.tokens)
    if damage != "drop":  # which aiohttp itself tries twice
        assert server.requests[f"train/{_SHARD}"] == 4
    assert not any(path.suffix == ".tmp" for path in cache.folder.iterdir())
    server.faults.clear()
    _assert_reads_alike(corpus, prepared.train)  # the server has recovered


def test_a_server_that_is_gone(prepared: Prepared, cache: Cache) -> None:
    with http_server(prepared.folder) as server:
        corpus = Corpus(f"{server.url}/train", cache)
    with pytest.raises(StorageError, match=r"try 4: ClientConnectorError.*: check the address"):
        corpus.read(0, 10)
    with pytest.raises(StorageError, match=r"/train/manifest\.json: .*try 4: ClientConnectorError"):
        Corpus(f"{server.url}/train", cache)


def test_a_cut_manifest_or_tokenizer_is_tried_again(prepared: Prepared, server: FaultyServer, cache: Cache) -> None:
    server.faults = {"manifest.json": deque(["cut"]), "tokenizer.model": deque(["corrupt", "cut"])}
    corpus = Corpus(f"{server.url}/train", cache)
    assert corpus.digest == prepared.train.digest
    assert corpus.open_tokenizer().digest == prepared.tokenizer.digest
    assert server.requests == {"train/manifest.json": 2, "tokenizer.model": 3}


def test_damage_on_the_cache_s_disk_is_found(prepared: Prepared, server: FaultyServer, cache: Cache) -> None:
    Corpus(f"{server.url}/train", cache).verify()
    cached = cache.folder / prepared.train.manifest.shards[0].data.sha256
    content = bytearray(cached.read_bytes())
    content[len(content) // 2] ^= 1
    cached.write_bytes(content)
    corpus = Corpus(f"{server.url}/train", cache)
    with pytest.raises(DataError, match=rf"^{cached} \(fetched from .*; remove it\): bytes .*: damaged"):
        corpus.read(0, corpus.tokens)


@pytest.mark.parametrize(
    ("url", "message"),
    [("nonsense://host/x", "nonsense:// cannot be read here"), ("s3x://host/x", "install fsspec's package")],
)
def test_a_protocol_that_is_not_installed(url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        read_url(url, _RETRY, most_bytes=100)


def test_join() -> None:
    assert join("s3://b/c/", "train") == "s3://b/c/train" and join("c", "train") == Path("c/train")
