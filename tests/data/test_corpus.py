"""Our reader and a plain WebDataset reader read back what was written, and refuse what is damaged."""

import io
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpora import Prepared

from triplane.data.corpus import Corpus
from triplane.data.index import ShardIndex
from triplane.data.manifest import Manifest
from triplane.data.shards import write_shard
from triplane.storage.errors import DataError


def _plain_documents(folder: Path) -> list[list[int]]:
    """The documents as an ordinary WebDataset consumer reads them."""
    shards = sorted(map(str, folder.glob("*.tar")))
    documents: list[list[int]] = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode():
        ends = np.cumsum(sample["len.npy"])
        assert ends[-1] == len(sample["tok.npy"])
        documents += [part.tolist() for part in np.split(sample["tok.npy"], ends[:-1])]
    return documents


@pytest.fixture(scope="module")
def documents(prepared: Prepared) -> list[list[int]]:
    return _plain_documents(prepared.folder / "train")


def _read_by_hand(documents: list[list[int]], start: int, count: int) -> tuple[list[int], list[int]]:
    tokens = [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)])[:-1] - start
    return tokens[start : start + count], [offset for offset in starts.tolist() if 0 < offset < count]


def test_a_plain_reader_and_ours_see_the_input(prepared: Prepared) -> None:
    tokenizer = prepared.tokenizer
    texts = []
    for corpus in (prepared.train, prepared.validation):
        documents = _plain_documents(Path(corpus.location))
        tokens, starts = corpus.read(0, corpus.tokens)
        assert [part.tolist() for part in np.split(tokens, starts)] == documents
        assert corpus.document_lengths().tolist() == [len(document) for document in documents]
        assert (corpus.documents, corpus.tokens) == (len(documents), sum(map(len, documents)))
        assert all(d[0] == tokenizer.bos_id and d[-1] == tokenizer.eos_id for d in documents)
        texts += [tokenizer.decode(document) for document in documents]
    assert sorted(texts) == sorted(prepared.texts)
    assert prepared.train.manifest.text_bytes + prepared.validation.manifest.text_bytes == sum(
        len(text.encode()) for text in texts
    )


def test_the_corpus_has_shards_and_blocks_to_cross(prepared: Prepared) -> None:
    folder = prepared.folder / "train"
    blocks = [len(ShardIndex.load(path).tokens) for path in folder.glob("*.npz")]
    assert len(blocks) >= 2 and max(blocks) >= 2


@settings(max_examples=200)
@given(data=st.data())
def test_any_read_equals_one_by_hand(prepared: Prepared, documents: list[list[int]], data: st.DataObject) -> None:
    corpus = prepared.train
    start = data.draw(st.integers(0, corpus.tokens - 1))
    count = data.draw(st.integers(1, min(50_000, corpus.tokens - start)))
    tokens, starts = corpus.read(start, count)
    assert (tokens.tolist(), starts.tolist()) == _read_by_hand(documents, start, count)


def test_short_reads_around_the_joints_of_shards_and_documents(prepared: Prepared, documents: list[list[int]]) -> None:
    corpus = prepared.train
    joints = np.cumsum([shard.tokens for shard in corpus.manifest.shards])[:-1].tolist()
    joints += [len(documents[0]), sum(map(len, documents[:256]))]
    for joint in joints:
        for start in range(joint - 3, joint + 3):
            for count in range(1, 7):
                tokens, starts = corpus.read(start, count)
                assert (tokens.tolist(), starts.tolist()) == _read_by_hand(documents, start, count), (start, count)


def test_a_large_vocabulary_and_long_documents(tmp_path: Path) -> None:
    documents = [np.full(600_000, token, np.uint32) for token in (70_000, 1, 2, 3)]
    stored = io.BytesIO(np.concatenate(documents).tobytes())
    lengths = np.full(4, 600_000, np.uint32)
    shard = write_shard(tmp_path, 0, tokens=stored, lengths=lengths, dtype=np.dtype(np.uint32))
    Manifest(tokenizer_digest="0" * 64, vocab_size=70_001, bos_id=1, text_bytes=1, shards=(shard,)).save(tmp_path)
    tokens, starts = Corpus(tmp_path).read(0, 2_400_000)
    assert starts.tolist() == [600_000, 1_200_000, 1_800_000]
    assert (tokens == np.concatenate(documents)).all()
    assert len(ShardIndex.load(tmp_path / shard.index.name).tokens) == 4


def _cut_at_a_block(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: ShardIndex.load(path.with_suffix(".idx.npz")).extents[1]])


def _flip(path: Path, where: Callable[[ShardIndex], int]) -> None:
    content = bytearray(path.read_bytes())
    content[where(ShardIndex.load(path.with_suffix(".idx.npz")))] ^= 4
    path.write_bytes(content)


def _flip_tar_header(path: Path) -> None:
    _flip(path, lambda index: int(index.extents[1]) + 5)


def _flip_array_header(path: Path) -> None:
    _flip(path, lambda index: int(index.offsets[1]) - 100)


def _flip_token(path: Path) -> None:
    _flip(path, lambda index: int(index.offsets[1]) + 2001)


def _zero_a_kib(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = int(ShardIndex.load(path.with_suffix(".idx.npz")).offsets[1])
    content[at : at + 1024] = bytes(1024)
    path.write_bytes(content)


def _damage_index(path: Path) -> None:
    index = path.with_suffix(".idx.npz")
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(content)


def _remove_index(path: Path) -> None:
    path.with_suffix(".idx.npz").unlink()


def _copy(prepared: Prepared, tmp_path: Path) -> Path:
    return shutil.copytree(prepared.folder / "train", tmp_path / "train")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_cut_at_a_block, r"\.tar: damaged: expected [\d,]+ bytes, found [\d,]+ bytes"),
        (Path.unlink, r"\.tar: damaged: expected [\d,]+ bytes, found no file"),
        (_remove_index, r"\.idx\.npz: damaged: expected [\d,]+ bytes, found no file"),
    ],
)
def test_a_missing_or_cut_file_is_found_on_opening(
    prepared: Prepared, tmp_path: Path, damage: Callable[[Path], None], found: str
) -> None:
    folder = _copy(prepared, tmp_path)
    damage(folder / "shard-000001.tar")
    with pytest.raises(DataError, match=f"shard-000001{found}: copy it again"):
        Corpus(folder)


@pytest.mark.parametrize("damage", [_flip_tar_header, _flip_array_header, _flip_token, _zero_a_kib])
def test_a_damaged_block_is_found_when_it_is_read(
    prepared: Prepared, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = _copy(prepared, tmp_path)
    damage(folder / "shard-000000.tar")
    corpus = Corpus(folder)
    first_block = int(ShardIndex.load(folder / "shard-000000.idx.npz").tokens[0])
    corpus.read(0, first_block)  # is whole
    with pytest.raises(
        DataError, match=r"shard-000000\.tar: bytes \d+ to \d+: damaged: expected CRC32 \w+, found \w+: .*"
    ):
        corpus.read(first_block - 1, 2)
    with pytest.raises(DataError, match=r"shard-000000\.tar: damaged: expected SHA-256 \w+, found \w+"):
        Corpus(folder).verify()


def test_a_damaged_index_is_found_when_its_shard_is_read(prepared: Prepared, tmp_path: Path) -> None:
    folder = _copy(prepared, tmp_path)
    _damage_index(folder / "shard-000001.tar")
    corpus = Corpus(folder)
    corpus.read(0, 100)
    with pytest.raises(DataError, match=r"shard-000001\.idx\.npz: damaged: expected SHA-256"):
        corpus.read(0, corpus.tokens)


def test_a_corpus_can_be_sent_to_another_process(prepared: Prepared) -> None:
    corpus = prepared.train
    expected = corpus.read(100, 50)[0].tolist()
    assert pickle.loads(pickle.dumps(corpus)).read(100, 50)[0].tolist() == expected


def test_an_undamaged_corpus_verifies(prepared: Prepared) -> None:
    prepared.train.verify()


def test_the_digest_is_of_the_whole_corpus(prepared: Prepared, tmp_path: Path) -> None:
    assert Corpus(_copy(prepared, tmp_path)).digest == prepared.train.digest != prepared.validation.digest


@pytest.mark.parametrize(("text", "message"), [(None, "No such file"), ("{", "prepare"), ('{"format": 2}', "format")])
def test_a_folder_without_a_readable_manifest_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        Corpus(tmp_path)


_ENDLESS_WRITER = """
import io, sys, numpy as np
from pathlib import Path
from triplane.data.shards import write_shard
for number in range(10_000):
    lengths = 1 + np.arange(5_000, dtype=np.uint32) % 300
    tokens = io.BytesIO(np.full(lengths.sum(), number, np.uint16).tobytes())
    write_shard(Path(sys.argv[1]), number, tokens=tokens, lengths=lengths, dtype=np.dtype(np.uint16))
"""


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    for round_ in range(3):
        folder = tmp_path / str(round_)
        folder.mkdir()
        writer = subprocess.Popen([sys.executable, "-c", _ENDLESS_WRITER, str(folder)])
        while not (folder / "shard-000001.tar").exists():
            assert writer.poll() is None
            time.sleep(0.005)
        time.sleep(0.007 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        shards = sorted(folder.glob("shard-*.tar"))
        for number, path in enumerate(shards):
            documents = _plain_documents_of(path)
            assert documents == [[number] * (1 + i % 300) for i in range(5_000)]
        for path in folder.glob("shard-*.idx.npz"):
            assert ShardIndex.load(path).lengths.sum() == sum(1 + i % 300 for i in range(5_000))


def _plain_documents_of(path: Path) -> list[list[int]]:
    alone = path.parent / f"alone-{path.stem}"
    alone.mkdir()
    shutil.copy(path, alone)
    return _plain_documents(alone)
