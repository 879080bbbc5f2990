"""Decodes stored documents to text."""

import codecs
import io
import json
import tokenize
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

from pydantic import BaseModel

_CHUNK_BYTES = 1 << 20


class Position(NamedTuple):
    """Position in the input."""

    file: int = 0
    """Number of files that are finished."""
    records: int = 0
    """Number of records of the next file that are finished."""


class Unread(NamedTuple):
    """Why a record has no content."""

    reason: str


Content = bytes | BinaryIO | Unread
"""A long content is an unnamed file, which disappears with its last reader."""


class Record(NamedTuple):
    """A document as stored."""

    name: str
    kind: Literal["text", "python", "json"]
    content: Content
    end: Position
    """Position after it, from which to resume."""
    read_bytes: int
    """Bytes of all input read so far, including it."""


class Rejection(BaseModel, extra="forbid", frozen=True):
    """An input that is not in the corpus, with the reason, which details may follow after a colon."""

    name: str
    reason: str


def text_of(record: Record, text_field: str) -> str:
    """Returns the text of a record; if it has none, raises ValueError with the reason."""
    text = "".join(text_pieces(record, text_field))
    if not text:
        raise ValueError("empty")
    return text


def text_pieces(record: Record, text_field: str) -> Iterator[str]:
    """Yields the text of a record in pieces, without holding all of a long one; raises ValueError as `text_of`."""
    content = record.content
    if isinstance(content, Unread):
        raise ValueError(content.reason)
    if record.kind == "json":
        assert isinstance(content, bytes)
        yield _field(content, text_field)
        return
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    encoding = "utf-8"
    if record.kind == "python":
        encoding = _python_encoding(file)
        file.seek(0)
    yield from _decoded(file, encoding)


def _decoded(file: BinaryIO, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    while True:
        chunk = file.read(_CHUNK_BYTES)
        pending = decoder.getstate()[0]
        try:
            piece = decoder.decode(chunk, final=not chunk)
            if encoding != "utf-8":
                piece.encode()  # UTF-7 and escapes can spell half a surrogate pair, which is not text
            yield piece
        except UnicodeDecodeError as error:
            at = read - len(pending) + error.start
            raise ValueError(f"not {error.encoding}: {error.reason} at byte {at}") from error
        except UnicodeError as error:
            raise ValueError(f"not {encoding}: {error}") from error
        if not chunk:
            return
        read += len(chunk)


def _field(content: bytes, text_field: str) -> str:
    if not content.strip():
        return ""
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding}: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not (isinstance(row, dict) and isinstance(row.get(text_field), str)):
        raise ValueError(f'no string "{text_field}"')
    text: str = row[text_field]
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is not text
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode: half a surrogate pair at character {error.start}") from error
    return text


def _python_encoding(file: BinaryIO) -> str:
    """Returns the encoding that a Python file declares."""
    try:
        encoding, _ = tokenize.detect_encoding(lambda: file.readline(_CHUNK_BYTES))
        b"x".decode(encoding)  # raises for codecs that do not encode text, such as rot13
        codecs.getincrementaldecoder(encoding)
    except SyntaxError as error:
        raise ValueError(f"not Python: {error.msg}") from error
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"not Python: {error}") from error
    return encoding
