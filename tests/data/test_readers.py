"""Each kind of input gives the same texts, and each damage is an error that names the file."""

import bz2
import contextlib
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from backports import zstd

from triplane.data.content import Limits
from triplane.data.prepare import read_documents
from triplane.data.readers import read_records
from triplane.data.records import Position, Rejection
from triplane.data.sources import find_files
from triplane.storage.errors import DataError

TEXTS = [f"text {i} é\n" for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def _read(*inputs: object, text_field: str = "text") -> tuple[list[str], list[Rejection]]:
    rejected: list[Rejection] = []
    texts = [text for _, text in read_documents([str(name) for name in inputs], rejected.append, text_field)]
    return texts, rejected


def _write_tar(path: Path, texts: list[str], member: str) -> None:
    with webdataset.TarWriter(str(path)) as tar:
        for i, text in enumerate(texts):
            tar.write({"__key__": f"a/{i:05d}", member: text if member == "txt" else {"text": text}, "cls": i})


def _write_parquet(path: Path, texts: Sequence[str | None]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=700)


def _write_dataset(folder: Path, texts: list[str]) -> None:
    """Writes the files that `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir()
    half = len(texts) // 2
    for i, part in enumerate((texts[:half], texts[half:])):
        table = pyarrow.table({"text": pyarrow.array(part, pyarrow.large_string())})
        path = folder / f"data-{i:05d}-of-00002.arrow"
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=400)
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"")
    (folder / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".zst", zstd.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_compressed_lines_of_several_frames(tmp_path: Path, suffix: str, compress: functools.partial) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    middle = LINES.index(b"\n", len(LINES) // 2) + 1
    path.write_bytes(compress(LINES[:middle]) + compress(LINES[middle:]))
    assert _read(path) == (TEXTS, [])
    path.write_bytes(compress(LINES)[:-20])
    with pytest.raises(DataError, match=rf"rows\.jsonl\{suffix}: cannot read this input: "):
        _read(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _write_parquet(path, [*TEXTS, None])
    texts, rejected = _read(tmp_path)
    assert texts == TEXTS
    assert rejected == [Rejection(name=f"{path}:3001", reason="no text: a null, or a sample without txt and json")]
    with pytest.raises(DataError, match=r'rows\.parquet: no column "body", only id, text: name one'):
        _read(path, text_field="body")
    with pytest.raises(DataError, match=r'column "id" contains int64, not strings'):
        _read(path, text_field="id")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"rows\.parquet: cannot read this input: "):
        _read(path)


def test_a_hugging_face_dataset_on_disk(tmp_path: Path) -> None:
    _write_dataset(tmp_path / "train", TEXTS)
    texts, rejected = _read(tmp_path)
    assert texts == TEXTS
    assert [(Path(item.name).name, item.reason) for item in rejected] == [
        ("cache-0123456789abcdef.arrow", "a cache of Hugging Face datasets"),
        ("state.json", "no document format: .json"),
    ]
    path = tmp_path / "train" / "data-00000-of-00002.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00000-of-00002\.arrow: damaged: an Arrow stream without its end"):
        _read(tmp_path)


def test_an_arrow_file(tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.ipc.new_file(tmp_path / "rows.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=999)
    assert _read(tmp_path) == (TEXTS, [])


@pytest.mark.parametrize("member", ["txt", "json"])
def test_webdataset_tars_by_a_pattern(tmp_path: Path, member: str) -> None:
    for i in range(3):
        _write_tar(tmp_path / f"part-{i}.tar", TEXTS[1000 * i : 1000 * (i + 1)], member)
    for pattern in ("part-{0..2}.tar", "part-*.tar"):
        assert _read(tmp_path / pattern) == (TEXTS, [])
    with pytest.raises(DataError, match=r"part-\{0\.\.3\}\.tar: no such input"):
        _read(tmp_path / "part-{0..3}.tar")


def test_a_sample_without_text_is_rejected(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        tar.write({"__key__": "0", "txt": "both", "json": {"text": "metadata"}})
        tar.write({"__key__": "1", "cls": 1})
    texts, rejected = _read(tmp_path)
    assert texts == ["both"]
    assert [item.name for item in rejected] == [f"{tmp_path}/a.tar:1"]


def test_links_and_pipes_in_a_tar_are_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "0.txt").write_text("text")
    (tmp_path / "1.txt").hardlink_to(tmp_path / "0.txt")
    (tmp_path / "2.txt").symlink_to("0.txt")
    os.mkfifo(tmp_path / "3.txt")
    (tmp_path / "folder").mkdir()
    names = ["0.txt", "1.txt", "2.txt", "3.txt", "folder"]
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path, *names], check=True)
    texts, rejected = _read(tmp_path / "a.tar")
    assert texts == ["text"]
    reason = "a link or special file, not a regular member"
    assert [(item.name, item.reason) for item in rejected] == [
        (f"{tmp_path}/a.tar:{number}.txt", reason) for number in (1, 2, 3)
    ]


def test_names_in_a_tar_cannot_move_the_cursor(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("\x1b[2J\né.txt"))
    assert [item.name for item in _read(tmp_path / "a.tar")[1]] == [f"{tmp_path}/a.tar:\\x1b[2J\\né.txt"]


def _unexpected(rejection: Rejection) -> None:
    pytest.fail(str(rejection))


def test_the_bound_of_a_row_is_that_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    nested = [{"a": 1, "b": "x" * 5000}] * 4
    pyarrow.parquet.write_table(pyarrow.table({"nested": nested, "text": ["short"] * 4}), path)
    files = find_files([str(path)], _unexpected)
    limits = Limits(document_bytes=1000)
    assert [record.content for record in read_records(files, "text", Position(), limits=limits)] == [b"short"] * 4
    pyarrow.parquet.write_table(pyarrow.table({"nested": [{"a": 1, "b": 2}], "text": ["x" * 5000]}), path)
    with pytest.raises(DataError, match=r"row group 0: 5,\d+ bytes a row, more than the limit of 1,000"):
        list(read_records(find_files([str(path)], _unexpected), "text", Position(), limits=limits))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_compressed_tables(tmp_path: Path, suffix: str) -> None:
    compress: Any = {
        ".gz": gzip.compress,
        ".zst": zstd.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }[suffix]
    _write_parquet(tmp_path / "rows", [*TEXTS])
    _write_dataset(tmp_path / "data", TEXTS)
    tables = {"1.parquet": tmp_path / "rows", "2.arrow": min((tmp_path / "data").glob("data-*"))}
    for name, path in tables.items():
        (tmp_path / f"{name}{suffix}").write_bytes(compress(path.read_bytes()))
    assert _read(tmp_path / f"1.parquet{suffix}") == (TEXTS, [])
    assert _read(tmp_path / f"2.arrow{suffix}") == (TEXTS[:1500], [])


def test_half_a_surrogate_pair_in_python_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# coding: utf-7\n+2AA-\n")
    (tmp_path / "b.py").write_bytes(b"# coding: unicode_escape\n\\ud800\n")
    (tmp_path / "c.py").write_bytes(b"# coding: utf-7\n+AOk-\n")
    texts, rejected = _read(tmp_path)
    assert texts == ["# coding: utf-7\né\n"]
    assert ["surrogates not allowed" in item.reason for item in rejected] == [True, True]


def _cut(content: bytearray, offset: int) -> bytearray:
    return content[:offset]


def _flip(content: bytearray, offset: int) -> bytearray:
    content[offset + 5] ^= 4
    return content


def _zero(content: bytearray, offset: int) -> bytearray:
    content[offset : offset + 1024] = bytes(1024)
    return content


@pytest.mark.parametrize("damage", [_cut, _flip, _zero])
@pytest.mark.parametrize("compressed", [False, True])
def test_damage_that_python_takes_for_the_end_of_a_tar(
    tmp_path: Path, damage: functools.partial, compressed: bool
) -> None:
    path = tmp_path / ("a.tar.gz" if compressed else "a.tar")
    _write_tar(tmp_path / "whole", TEXTS[:100], "txt")
    with tarfile.open(tmp_path / "whole") as tar:
        offset = tar.getmembers()[51].offset
    content = damage(bytearray((tmp_path / "whole").read_bytes()), offset)
    path.write_bytes(gzip.compress(content) if compressed else content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 51  # silently
    with pytest.raises(DataError, match=r"a\.tar(\.gz)?: damaged: "):
        _read(path)


@contextlib.contextmanager
def _serve(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    _write_parquet(tmp_path / "c.parquet", TEXTS)
    _write_tar(tmp_path / "d.tar", TEXTS, "txt")
    # Python's server does not serve ranges, which a file over some hundred KiB needs.
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress((tmp_path / "d.tar").read_bytes()))
    (tmp_path / "d.tar").unlink()
    names = [path.name for path in sorted(tmp_path.iterdir())]
    with _serve(tmp_path) as url:
        for name in names:
            assert _read(f"{url}/{name}") == (TEXTS, []), name
        with pytest.raises(DataError, match=r"http://.*/nothing: no such input"):
            _read(f"{url}/nothing")
    assert _read(f"file://{tmp_path}/a.jsonl") == (TEXTS, [])
    memory = fsspec.filesystem("memory")
    memory.pipe("/folder/a.jsonl", LINES)
    memory.pipe("/folder/deep/b.txt", b"b")
    assert _read("memory://folder") == ([*TEXTS, "b"], [])
    assert _read("memory://folder/*.jsonl") == (TEXTS, [])
    with pytest.raises(DataError, match="nosuch://a: cannot read this input: Protocol not known"):
        _read("nosuch://a")


def test_reading_goes_on_from_any_position(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES[: LINES.index(b"text 50 ") - 10])
    (tmp_path / "b.txt").write_text("b")
    _write_parquet(tmp_path / "c.parquet", TEXTS[:30])
    _write_tar(tmp_path / "d.tar", TEXTS[:30], "txt")
    files = find_files([str(tmp_path)], print)
    records = list(read_records(files, "text", Position()))
    assert records[-1].read_bytes == sum(file.size or 0 for file in files)
    for i, record in enumerate(records):
        rest = list(read_records(files, "text", record.end))
        assert [(item.name, item.content) for item in rest] == [(item.name, item.content) for item in records[i + 1 :]]


def test_deep_json_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(io.BytesIO(b"[" * 200_000 + b"\n\n" + b'{"text": "good"}\n').getvalue())
    texts, rejected = _read(tmp_path)
    assert texts == ["good"] and [item.reason for item in rejected] == ["not JSON: nested too deeply", "empty"]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".xz", lzma.compress), (".bz2", bz2.compress), (".gz", gzip.compress)]
)
def test_what_follows_a_compressed_stream_must_be_one(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    stream = compress(LINES)
    for damage in (stream + b"X" + stream, stream + stream[:-9], stream + b"garbage", b"X" + stream):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="cannot read this input") as caught:
            _read(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(stream + bytes(512) + (stream if suffix == ".xz" else b""))
    assert _read(path)[0] == TEXTS * (2 if suffix == ".xz" else 1)


def test_a_tar_cannot_take_more_memory_than_it_has_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("x" * (2 << 20) + ".txt"))
    with pytest.raises(DataError, match=r"a\.tar: a header of 2,097,\d+ bytes, more than the limit of 1,048,576"):
        _read(path)
    sparse = tmp_path / "hole.txt"
    with open(sparse, "wb") as file:
        file.truncate(1 << 30)
    subprocess.run(["tar", "--sparse", "-cf", path, "-C", tmp_path, "hole.txt"], check=True)
    texts, rejected = _read(path)
    assert texts == [] and [item.reason for item in rejected] == ["a sparse file, whose size its bytes do not bound"]


@pytest.mark.parametrize("name", ["rows.jl", "rows.json.1", "rows", "rows.jsonl.bak.gz"])
def test_json_lines_under_another_name_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(gzip.compress(start + LINES) if path.suffix == ".gz" else start + LINES)
        with pytest.raises(DataError, match="contains JSON lines, unlike its name"):
            _read(path)


def test_a_text_under_any_name_is_read(tmp_path: Path) -> None:
    for content in ("a novel\n", "{a brace}\n", "[1]\n", '{"in": "a text"}\n'):
        path = tmp_path / ("page.txt" if content.startswith('{"') else "page.log")
        path.write_text(content)
        assert _read(path) == ([content], [])
