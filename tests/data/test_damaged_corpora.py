"""Corpora from elsewhere, whose checksums fit: what is wrong with one ends in one line, and touches nothing else."""

import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import http_server
from small_corpora import Prepared

from triplane.data.cache import Cache
from triplane.data.config import DataConfig
from triplane.data.corpus import Corpus
from triplane.data.inspect import describe
from triplane.data.loader import SequenceDataset
from triplane.data.opening import open_sources, training_plan
from triplane.storage.errors import DataError
from triplane.storage.remote import Retry

_ODD_VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**15, 10**30, float("inf"), "", "x", "\0", "\ud800",
    "../../../etc/passwd", "/etc/passwd", "a/b", ".", "..", [], [1], {}, "0" * 63, "G" * 64, "../" * 10 + "0" * 34,
]  # fmt: skip


def _use(folder: Path) -> None:
    """Inspects, verifies and reads a corpus, as the commands do."""
    describe(folder, 2)
    for corpus in Corpus.open_splits(folder):
        corpus.verify()
    config = DataConfig.model_validate({"sources": [{"corpus": str(folder)}], "seq_len": 64, "shuffle_window": 64})
    sources = open_sources(config, folder)
    dataset = SequenceDataset(sources.train, training_plan(config, sources.train, 1, folder), True)
    for position in range(0, len(dataset), 50):
        dataset[[position]]


def _problem(folder: Path) -> str | None:
    try:
        _use(folder)
    except DataError as error:
        return str(error)
    return None


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Each container and key in it."""
    keys = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, below in keys for place in [(value, key), *_places(below)]]


def _edit_manifest(folder: Path, draw: random.Random) -> None:
    path = folder / draw.choice(["train", "validation"]) / "manifest.json"
    manifest = json.loads(path.read_text())
    container, key = draw.choice(_places(manifest))
    match draw.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.append(container[key])
        case 2:
            manifest["unknown"] = 1
        case _:
            container[key] = draw.choice([odd for odd in _ODD_VALUES if odd != container[key]])
    path.write_text(json.dumps(manifest))


def _rewrite(folder: Path, kind: str, change: Callable[[Path], object]) -> None:
    """Changes a file of the first training shard and gives it the checksum that fits."""
    path = folder / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    stored = manifest["shards"][0][kind]
    file = folder / "train" / stored["name"]
    change(file)
    stored |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest))


def _edit_index(folder: Path, draw: random.Random) -> None:
    def change(file: Path) -> None:
        with np.load(file) as stored:
            arrays = dict(stored)
        name = draw.choice(list(arrays))
        array = arrays[name]
        match draw.randrange(7):
            case 0:
                del arrays[name]
            case 1:
                arrays[name] = array[:-1]
            case 2:
                arrays[name] = array.astype(np.float64)
            case 3:
                arrays[name] = array.reshape(1, -1)
            case 4:
                arrays["more"] = array
            case 5:
                arrays[name] = np.array([{}] * len(array), object)
            case _:
                arrays[name] = array.copy()
                arrays[name][draw.randrange(len(array))] += draw.choice([1, 1 << 20, (1 << 31) - 1])
        np.savez(file, **arrays)

    _rewrite(folder, "index", change)


def _no_index(folder: Path, draw: random.Random) -> None:
    contents = [b"", b"\0", b"PK\3\4", b"\x80\x04N.", draw.randbytes(3000), b"PK\5\6" + bytes(18)]
    _rewrite(folder, "index", lambda file: file.write_bytes(draw.choice(contents[1:])))


def _index_with_a_lie(folder: Path, draw: random.Random) -> None:
    def change(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in contents.items():
                if name == "crc32.npy":
                    header = io.BytesIO()
                    shape = draw.choice([(10**18,), (-1,), (), (1, 2)])
                    np.lib.format.write_array_header_1_0(
                        header, {"descr": "<u4", "fortran_order": False, "shape": shape}
                    )
                    content = header.getvalue() + bytes(draw.choice([0, 100, 50_000_000]))
                archive.writestr(name, content)

    _rewrite(folder, "index", change)


def _edit_tar(folder: Path, draw: random.Random) -> None:
    def change(file: Path) -> None:
        content = bytearray(file.read_bytes())
        at = draw.randrange(len(content) - 512)
        match draw.randrange(3):
            case 0:
                content = content[:at]
            case 1:
                content[at : at + 512] = b"\xff" * 512
            case _:
                content += b"\1" * 10_240
        file.write_bytes(content)

    _rewrite(folder, "data", change)


def _odd_json(folder: Path, draw: random.Random) -> None:
    contents = [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"null", b"[]", b"{}", b"NaN", b"1e999", b"\0" * 999]
    (folder / "train" / "manifest.json").write_bytes(draw.choice(contents))


def _odd_files(folder: Path, draw: random.Random) -> None:
    file = draw.choice([path for path in sorted(folder.rglob("*")) if path.suffix in (".tar", ".npz", ".model")])
    target = file if draw.random() < 0.7 else folder / "train" / "manifest.json"
    target.unlink()
    match draw.randrange(4):
        case 0:
            target.symlink_to(target)
        case 1:
            os.mkfifo(target)
        case 2:
            target.mkdir()
        case _:
            pass


def _swap(folder: Path, draw: random.Random) -> None:
    (folder / "train").rename(folder / "x")
    (folder / "validation").rename(folder / "train")
    (folder / "x").rename(folder / "validation")


def _other_tokenizer(folder: Path, draw: random.Random) -> None:
    contents = [b"", b"{}", b"[]", b"{" * 100_000, draw.randbytes(1000), b'{"model": {"type": "BPE"}}']
    (folder / "tokenizer.model").write_bytes(draw.choice(contents))


_DAMAGES: dict[Callable[[Path, random.Random], None], int] = {
    _edit_manifest: 40, _edit_index: 25, _no_index: 6, _index_with_a_lie: 10, _edit_tar: 10, _odd_json: 10,
    _odd_files: 10, _swap: 1, _other_tokenizer: 6,
}  # fmt: skip


@pytest.mark.parametrize("damage", _DAMAGES, ids=lambda damage: damage.__name__)
def test_each_damage_is_one_line(
    prepared: Prepared, tmp_path: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    told = 0
    for seed in range(_DAMAGES[damage]):
        folder = tmp_path / str(seed)
        shutil.copytree(prepared.folder, folder)
        damage(folder, random.Random(seed))
        before = sorted(folder.rglob("*"))
        message = _problem(folder)
        told += message is not None
        assert message is None or ("\n" not in message and str(tmp_path) in message), seed
        assert sorted(folder.rglob("*")) == before, seed
        shutil.rmtree(folder)
    assert told >= 0.7 * _DAMAGES[damage], "what is damaged is mostly seen"


def _stored_index(file: Path, method: int, change: Callable[[bytes], bytes] = bytes) -> None:
    """Writes the index again with that compression, and a changed `crc32`."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["crc32.npy"] = change(contents["crc32.npy"])
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_index_that_would_grow_as_it_is_read_is_refused(prepared: Prepared, tmp_path: Path, method: int) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared.folder, folder)
    _rewrite(folder, "index", lambda file: _stored_index(file, method))
    with pytest.raises(DataError, match="compressed arrays, whose size the file's does not bound"):
        Corpus(folder / "train").read(0, 10)


@pytest.mark.parametrize("header", [b"{'descr': {}, (1,): 2, 'shape': 3}", b"{'descr': (", b"{[]: 1}", b"{1: (2L"])
def test_a_header_that_numpy_stumbles_over_is_a_line(prepared: Prepared, tmp_path: Path, header: bytes) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared.folder, folder)

    def change(content: bytes) -> bytes:
        size = int.from_bytes(content[8:10], "little")
        return content[:10] + header.ljust(size) + content[10 + size :]

    _rewrite(folder, "index", lambda file: _stored_index(file, zipfile.ZIP_STORED, change))
    with pytest.raises(DataError, match=r"damaged: expected the index of shard-000000\.tar"):
        Corpus(folder / "train").read(0, 10)


def test_a_key_of_a_manifest_cannot_move_the_cursor(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared.folder, folder)
    path = folder / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"\x1b[2J\n": 1}))
    with pytest.raises(DataError, match=r"manifest\.json: \\x1b\[2J\\n: Extra inputs"):
        Corpus(folder / "train")


def test_a_tokenizer_of_unknown_files_is_told(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared.folder, folder)
    (folder / "foo").touch()
    path = folder / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_files": ["foo"]}))
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model is among the tokenizer's files"):
        Corpus(folder / "train").open_tokenizer()


def test_a_token_beyond_the_vocabulary_is_told(prepared: Prepared, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(prepared.folder, folder)
    path = folder / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 400', '"vocab_size": 300'))
    with pytest.raises(DataError, match=r"damaged: expected tokens below 300, the size of the vocabulary, found 3\d\d"):
        Corpus(folder / "train").read(0, 1000)


def test_a_corpus_at_a_url_touches_nothing_outside_its_cache(prepared: Prepared, tmp_path: Path) -> None:
    served, victims = tmp_path / "served", tmp_path / "victims"
    shutil.copytree(prepared.folder, served)
    victims.mkdir()
    for name in ("g", ".g.tmp", ".g.lock"):
        (victims / name).touch()
        os.utime(victims / name, (1, 1))
    path = served / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    cache = Cache(tmp_path / "cache" / "x", 1 << 30, Retry(0, 1.0))
    for key, value in (("sha256", "../../victims/g"), ("name", "../../victims/g"), ("name", "/etc/passwd")):
        edited = json.loads(json.dumps(manifest))
        edited["shards"][0]["index"][key] = value
        path.write_text(json.dumps(edited))
        with http_server(served) as server, pytest.raises(DataError, match=f"index.{key}: String should match"):
            Corpus(f"{server.url}/train", cache)
    assert {(file.name, file.stat().st_mtime) for file in victims.iterdir()} == {
        ("g", 1), (".g.tmp", 1), (".g.lock", 1)
    }  # fmt: skip
