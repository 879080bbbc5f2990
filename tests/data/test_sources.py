"""Documents come in one order, as they are; what is no text is named and not dropped."""

from pathlib import Path

import pytest

from triplane.data.errors import DataError
from triplane.data.prepare import read_documents
from triplane.data.records import Rejection
from triplane.data.sources import PYTHON_STDLIB


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
    with pytest.raises(DataError, match=r"no file in there ends in \.arrow, \.jsonl, "):
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
