"""One stored document: where it is, and how its bytes become text."""

import io
import json
import tokenize
from typing import Literal, NamedTuple

from pydantic import BaseModel


class Position(NamedTuple):
    """How far the input has been read."""

    file: int = 0
    """Files before this one are finished."""
    records: int = 0
    """Records of this file that are finished."""


class Record(NamedTuple):
    """A document as it is stored."""

    name: str
    kind: Literal["text", "python", "json"]
    content: bytes | None
    """None: there is none, as in a null of a table."""
    end: Position
    """Where to read on after it."""
    read_bytes: int
    """Bytes of all input that have been read when it is."""


class Rejection(BaseModel, extra="forbid", frozen=True):
    """An input that is not in the corpus, and why: a reason, and perhaps a colon and details."""

    name: str
    reason: str


def text_of(record: Record, text_field: str) -> str:
    """The text of a record; raises ValueError, whose message is a reason, if it holds none."""
    if record.content is None:
        raise ValueError("no text: a null, or a sample without txt and json")
    try:
        if record.kind == "json":
            text = _field(record.content, text_field)
        elif record.kind == "python":
            text = _python(record.content)
        else:
            text = record.content.decode()
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"not {error.encoding}: {error.reason} at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ValueError(f"not Unicode: half a surrogate pair at character {error.start}") from error
    if not text:
        raise ValueError("empty")
    return text


def _field(content: bytes, text_field: str) -> str:
    if not content.strip():
        return ""
    try:
        row = json.loads(content.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deeply") from error
    if not (isinstance(row, dict) and isinstance(row.get(text_field), str)):
        raise ValueError(f'no string "{text_field}"')
    text: str = row[text_field]
    return text


def _python(content: bytes) -> str:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    except SyntaxError as error:
        raise ValueError(f"not Python: {error.msg}") from error
    return content.decode(encoding)
