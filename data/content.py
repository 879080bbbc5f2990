"""Reads a document's content up to a limit: into memory if short, into an unnamed file if long."""

import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

from triplane.data.records import Content, Unread
from triplane.storage.files import disk_full_is_an_error

LONG_BYTES = 1 << 22
"""Longer documents are never held in memory as a whole."""
ROW_BYTES = 1 << 26
"""Limit for JSON rows and table values, which are; the text of one may take four times as much, twice."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Limits(NamedTuple):
    """Limits on what reading may use."""

    document_bytes: int = 256 << 20
    """Longer documents are rejected."""
    folder: Path | None = None
    """Folder for long contents; None: the system's temporary folder."""

    @property
    def row_bytes(self) -> int:
        return min(self.document_bytes, ROW_BYTES)


DEFAULT_LIMITS = Limits()


def read_content(stream: IO[bytes], limits: Limits) -> Content:
    """Reads the rest of `stream`."""
    start = read_fully(stream, LONG_BYTES + 1)
    if len(start) <= min(LONG_BYTES, limits.document_bytes):
        return start
    size = len(start)
    with unnamed_file(limits) as file:
        file.write(start)
        while size <= limits.document_bytes and (chunk := stream.read(_CHUNK_BYTES)):
            size += len(chunk)
            file.write(chunk)
    if size > limits.document_bytes:
        return too_long(limits.document_bytes)
    file.seek(0)
    return file


@contextmanager
def unnamed_file(limits: Limits) -> Iterator[BinaryIO]:
    """Yields a file to write, which stays open for its readers; raises StorageError if the disk is full."""
    folder = limits.folder or Path(tempfile.gettempdir())
    with disk_full_is_an_error(folder / "a temporary file"):
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - its readers close it
        yield file
        file.flush()


def read_row(stream: IO[bytes], limits: Limits) -> Content:
    """Reads the rest of `stream`, a JSON document, without a byte order mark."""
    content = read_fully(stream, limits.row_bytes + 1)
    return too_long(limits.row_bytes) if len(content) > limits.row_bytes else content.removeprefix(_BOM)


def read_line(stream: IO[bytes], limits: Limits) -> Content:
    """Reads the next line; empty at the end."""
    line = stream.readline(limits.row_bytes + 1)
    if len(line) <= limits.row_bytes:
        return line
    while line and not line.endswith(b"\n"):
        line = stream.readline(_CHUNK_BYTES)
    return too_long(limits.row_bytes)


def read_fully(stream: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes, or fewer if the stream ends, where its own `read` may return early."""
    buffer = io.BytesIO()
    while buffer.tell() < size and (chunk := stream.read(min(_CHUNK_BYTES, size - buffer.tell()))):
        buffer.write(chunk)
    return buffer.getvalue()


def too_long(limit_bytes: int) -> Unread:
    return Unread(f"longer than {limit_bytes:,} bytes, the limit of a document or row")
