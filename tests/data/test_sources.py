"""Documents come in one order, as they are; what is no text is named and not dropped."""

import gzip
import os
from pathlib import Path

import pytest

from triplane.data.prepare import read_documents
from triplane.data.records import Rejection
from triplane.data.sources import PYTHON_STDLIB
from triplane.storage.errors import DataError


def _read(*inputs: object) -> tuple[list[tuple[str, str]], list[Rejection]]:
    rejected: list[Rejection] = []
    return list(read_documents([str(name) for name in inputs], rejected.append)), rejected


def test_a_folder_is_read_recursively_in_order_and_unchanged(tmp_path_factory: pytest.TempPathFactory) -> None:
    tmp_path, elsewhere = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.txt").write_text("far")
    (tmp_path / "linked").symlink_to(elsewhere)
    (tmp_path / ".hidden.txt").write_text("left out")
    texts = {"b.txt": "two\r\n", "a/z.md": "\ufeffone", "a.py": "x = 'é'\n", "c.jsonl": '{"text": "three"}\n'}
    (tmp_path / "a").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    documents, rejected = _read(tmp_path)
    names = [str(Path(name).relative_to(tmp_path)) for name, _ in documents]
    assert names == ["a.py", "a/z.md", "b.txt", "c.jsonl:1", "linked/far.txt"]
    assert [text for _, text in documents] == ["x = 'é'\n", "\ufeffone", "two\r\n", "three", "far"]
    assert rejected == [Rejection(name=f"{tmp_path}/image.png", reason="no document format: .png")]


def test_what_is_no_text_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cookie.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "lie.py").write_bytes(b"# coding: no-such-codec\n")
    lines = ['{"text": "good"}', "{", '{"txt": "a"}', '{"text": 1}', '{"text": "\\ud800"}', '{"text": "also good"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    documents, rejected = _read(tmp_path)
    assert [text for _, text in documents] == ["# coding: latin-1\nx = 'é'\n", "good", "also good"]
    reasons = {Path(rejection.name).name: rejection.reason for rejection in rejected}
    assert list(reasons) == [
        "bad.txt", "empty.txt", "lie.py", "rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4", "rows.jsonl:5"
    ]  # fmt: skip
    assert reasons["bad.txt"] == "not utf-8: unexpected end of data at byte 3" and reasons["empty.txt"] == "empty"
    assert "unknown encoding" in reasons["lie.py"] and "surrogate pair" in reasons["rows.jsonl:5"]


def test_a_named_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_text("text")
    assert _read(tmp_path / "notes.log") == ([(str(tmp_path / "notes.log"), "text")], [])


def test_a_missing_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such input"):
        next(read_documents([PYTHON_STDLIB, str(tmp_path / "nowhere")], print))


def test_a_folder_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    with pytest.raises(DataError, match=r"contains no file that ends in \.arrow, \.jsonl, "):
        _read(tmp_path)


def test_a_dangling_link_in_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(DataError, match=r"link\.txt: cannot read"):
        _read(tmp_path)


def test_the_standard_library_without_its_tests() -> None:
    documents, _ = _read(PYTHON_STDLIB)
    names = [name for name, _ in documents]
    assert f"{PYTHON_STDLIB}/argparse.py" in names and f"{PYTHON_STDLIB}/topics/lambda" in names
    assert not [name for name in names if "/test/" in name or "/site-packages/" in name]
    assert sum(len(text) for _, text in documents) > 8_000_000


def _folder(path: Path, documents: int = 3) -> Path:
    path.mkdir(parents=True)
    for i in range(documents):
        (path / f"{i}.txt").write_text(f"text {i}")
    return path


def test_a_loop_of_links_gives_each_document_once(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "loop" / "sub").parent
    for name in ("up", "again"):
        (folder / "sub" / name).symlink_to("..")
    (folder / "a-copy").symlink_to("sub")
    expected = [f"{folder}/sub/{i}.txt" for i in range(3)]
    for name in (str(folder), f"{folder}/**/*.txt", f"{folder}/**", f"{tmp_path}/*/**/[0-9].txt"):
        documents, rejected = _read(name)
        assert ([name for name, _ in documents], rejected) == (expected, []), name
    assert [name for name, _ in _read(f"{folder}/**/1.*")[0]] == expected[1:2]


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "texts")
    os.mkfifo(folder / "pipe.txt")
    (folder / "zero.txt").symlink_to("/dev/zero")
    documents, rejected = _read(folder)
    assert len(documents) == 3
    assert [(Path(item.name).name, item.reason) for item in rejected] == [
        ("pipe.txt", "not a regular file"), ("zero.txt", "not a regular file")
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"pipe\.txt: not a regular file"):
        _read(folder / "pipe.txt")


def test_names_that_are_not_utf8_can_be_told(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "texts", 1)
    name = os.fsencode(folder) + b"/caf\xe9"
    for suffix, content in ((b".txt", b"good"), (b"2.txt", b"\xff"), (b".png", b"")):
        with open(name + suffix, "wb") as file:
            file.write(content)
    documents, rejected = _read(folder)
    assert documents == [(f"{folder}/0.txt", "text 0"), (f"{folder}/caf\\xe9.txt", "good")]
    assert {item.name for item in rejected} == {f"{folder}/caf\\xe92.txt", f"{folder}/caf\\xe9.png"}


@pytest.mark.parametrize("name", ["a.json", "a.JSONL", "a.ndjson", "a.json.gz", "a.JSON.GZ"])
def test_json_lines_by_any_name(tmp_path: Path, name: str) -> None:
    content = b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert [text for _, text in _read(tmp_path / name)[0]] == ["one", "two"]


@pytest.mark.parametrize("coding", ["rot13", "hex", "undefined", "no-such-codec", "utf-16"])
def test_an_odd_encoding_is_one_rejection(tmp_path: Path, coding: str) -> None:
    (tmp_path / "a.py").write_bytes(f"# coding: {coding}\nx = 'y'\n".encode())
    (tmp_path / "b.py").write_text("x = 1\n")
    documents, rejected = _read(tmp_path)
    assert [text for _, text in documents] == ["x = 1\n"]
    assert [Path(item.name).name for item in rejected] == ["a.py"] and "\n" not in rejected[0].reason
