"""Documents from files, folders and Python's own library, always in the same order."""

import glob
import io
import json
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from triplane.data.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""The input that every machine has: the sources and documentation of Python's standard library, about 12 MB."""

TEXT_SUFFIXES = frozenset((".jsonl", ".md", ".py", ".rst", ".tex", ".txt"))
"""What is read in a folder. A file that is named as an input is read whatever its suffix."""

_STDLIB_SKIPPED = frozenset(("dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"))


class Document(NamedTuple):
    """A text and where it came from."""

    name: str
    text: str


class Rejection(BaseModel, extra="forbid", frozen=True):
    """A document that could not be read, and why."""

    name: str
    reason: str


def read_documents(inputs: Sequence[str], reject: Callable[[Rejection], object]) -> Iterator[Document]:
    """Yields the documents of each input in turn; those that are no text go to `reject`.

    An input is a folder (its files with TEXT_SUFFIXES, sorted; hidden ones are left out), a `.jsonl` file with a
    `text` in each line, any other file (one document) or PYTHON_STDLIB. Raises DataError for an input that is
    missing, before anything is read, or that holds no file of text or can't be read.
    """
    for name in inputs:
        if name != PYTHON_STDLIB and not Path(name).exists():
            raise DataError(f"{name}: no such input; it must be a file, a folder or {PYTHON_STDLIB}")
    for name in inputs:
        if name == PYTHON_STDLIB:
            yield from _read_stdlib(reject)
        elif Path(name).is_dir():
            for path in _text_files(name):
                yield from _read_file(path, str(path), reject)
        else:
            yield from _read_file(Path(name), name, reject)


def _text_files(folder: str) -> list[Path]:
    # Unlike Path.rglob this follows links to folders, as collections of text often are.
    paths = map(Path, sorted(glob.glob(f"{glob.escape(folder)}/**/*", recursive=True)))
    files = [path for path in paths if path.suffix in TEXT_SUFFIXES and not path.is_dir()]
    if not files:
        raise DataError(f"{folder}: no file in there ends in {', '.join(sorted(TEXT_SUFFIXES))}")
    return files


def _read_stdlib(reject: Callable[[Rejection], object]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _STDLIB_SKIPPED.intersection(relative.parts):
            yield from _read_file(path, f"{PYTHON_STDLIB}/{relative}", reject)
    from pydoc_data.topics import topics  # half a megabyte of text, for this input only

    for topic in sorted(topics):
        yield Document(f"{PYTHON_STDLIB}/topics/{topic}", topics[topic])


def _read_file(path: Path, name: str, reject: Callable[[Rejection], object]) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    yield from _parse(f"{name}:{number}", line, _text_field, reject)
        else:
            yield from _parse(name, path.read_bytes(), _python if path.suffix == ".py" else bytes.decode, reject)
    except OSError as error:
        raise DataError(f"{name}: cannot read this input: {error.strerror}") from error


def _parse(
    name: str, raw: bytes, parse: Callable[[bytes], str], reject: Callable[[Rejection], object]
) -> Iterator[Document]:
    try:
        text = parse(raw)
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except (ValueError, SyntaxError) as error:
        reject(Rejection(name=name, reason=str(error)))
        return
    if text:
        yield Document(name, text)
    else:
        reject(Rejection(name=name, reason="empty"))


def _python(raw: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
    return raw.decode(encoding)


def _text_field(line: bytes) -> str:
    row = json.loads(line.decode())
    if not (isinstance(row, dict) and isinstance(row.get("text"), str)):
        raise ValueError('not a JSON object with a string "text"')
    text: str = row["text"]
    return text
