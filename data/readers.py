"""Reads the records of each file format, in a fixed order; damage raises and is never skipped.

A library for a single format is imported when first needed.
"""

import io
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import PurePosixPath
from stat import S_ISREG
from typing import IO, Any, BinaryIO, Literal

import fsspec

from triplane.data.content import (
    DEFAULT_LIMITS,
    LONG_BYTES,
    Limits,
    read_content,
    read_line,
    read_row,
    too_long,
    unnamed_file,
)
from triplane.data.decompression import decompressed
from triplane.data.records import Content, Position, Record, Unread
from triplane.data.sources import SourceFile
from triplane.storage.errors import DataError, TriplaneError, printable

_Row = tuple[str, Literal["text", "python", "json"], Content]
"""Suffix of its name, kind and content."""

_ROWS = 64
"""Rows of a table to read at once."""
_DRAIN_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
"""Limit for a long name or attribute of a tar member, which tarfile reads into memory."""
_HEADERS = (b"L", b"K", b"x", b"g", b"X")
_NO_TEXT = Unread("no text: a null, or a sample without txt and json")


def read_records(
    files: Sequence[SourceFile], text_field: str, start: Position, *, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Record]:
    """Yields the records of `files` from `start` on; raises DataError if a file cannot be read to its end."""
    before_bytes = sum(file.size or 0 for file in files[: start.file])
    for number, file in enumerate(files[start.file :], start.file):
        skipped = start.records if number == start.file else 0
        try:
            with _open(file) as raw, closing(decompressed(raw, PurePosixPath(file.path).suffix.lower())) as stream:
                rows = itertools.islice(_reader(file)(stream, text_field, limits), skipped, None)
                for count, (suffix, kind, content) in enumerate(rows, skipped + 1):
                    yield Record(
                        name=file.name + suffix,
                        kind=kind,
                        content=content,
                        end=Position(number, count),
                        read_bytes=before_bytes + raw.tell(),
                    )
        except TriplaneError as error:
            raise DataError(f"{file.name}: {error}") from error
        except MemoryError as error:
            raise DataError(f"{file.name}: cannot read this input: a part of it does not fit into memory") from error
        except Exception as error:  # each format, compression and protocol raises its own exceptions
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{file.name}: cannot read this input: {reason}") from error
        before_bytes += file.size or 0


def _open(file: SourceFile) -> IO[bytes]:
    if "://" not in file.path:
        # O_NONBLOCK: a pipe or device may have replaced the file since it was found, and would block.
        descriptor = os.open(file.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataError("not a regular file")
        whole = os.fdopen(descriptor, "rb")
        return whole if file.part is None else io.BufferedReader(_Part(whole, file.part))
    fs, path = fsspec.url_to_fs(file.path)
    return fs.open(path, "rb")


class _Part(io.RawIOBase):
    """Reads some bytes of a file."""

    def __init__(self, whole: BinaryIO, part: range):
        self._whole, self._part = whole, part
        whole.seek(part.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._whole.readinto(memoryview(buffer)[: self._part.stop - self._whole.tell()])  # type: ignore[attr-defined]

    def tell(self) -> int:
        return self._whole.tell() - self._part.start

    def close(self) -> None:
        self._whole.close()
        super().close()


_Reader = Callable[[IO[bytes], str, Limits], Iterator[_Row]]


def _reader(file: SourceFile) -> _Reader:
    return _READERS.get(file.format, _unknown)


def _text(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    yield "", "text", read_content(stream, limits)


def _unknown(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    content = read_content(stream, limits)
    if not isinstance(content, Unread) and _starts_with_json(content):
        raise DataError("contains JSON lines, unlike its name: rename it to .jsonl, or to .txt if it is a single text")
    yield "", "text", content


def _starts_with_json(content: bytes | BinaryIO) -> bool:
    """Returns whether the first line is a JSON object."""
    if isinstance(content, bytes):
        line = content.partition(b"\n")[0]
    else:
        line = content.readline(LONG_BYTES)
        content.seek(0)
    try:
        return isinstance(json.loads(line.removeprefix(b"\xef\xbb\xbf")), dict)
    except (ValueError, RecursionError):
        return False


def _python(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    yield "", "python", read_content(stream, limits)


def _lines(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    # Other streams cannot read a line up to a limit, or read it byte by byte.
    buffered: IO[bytes] = stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream)  # type: ignore
    for number in itertools.count(1):
        line = read_line(buffered, limits)
        if not line:
            return
        if number == 1 and isinstance(line, bytes):
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield f":{number}", "json", line


def _parquet(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    from pyarrow.parquet import ParquetFile

    stream = _seekable(stream, limits)
    metadata = ParquetFile(stream).metadata
    _check_column(metadata.schema.to_arrow_schema(), text_field)
    # Keeps a repeated value in memory only once, and of a column only the pages being read.
    file = ParquetFile(stream, metadata=metadata, read_dictionary=[text_field], buffer_size=_DRAIN_BYTES)
    # Row groups index the leaves of nested columns, while the schema indexes columns.
    leaf = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_field)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        mean_bytes = group.column(leaf).total_uncompressed_size // max(1, group.num_rows)
        if mean_bytes > limits.row_bytes:
            raise DataError(
                f"row group {number}: {mean_bytes:,} bytes a row, more than the limit of {limits.row_bytes:,}"
            )
    yield from _table_rows(file.iter_batches(_ROWS, columns=[text_field]), text_field, limits)


def _arrow(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    from pyarrow import ipc

    stream = _seekable(stream, limits)
    if stream.read(6) == b"ARROW1":
        stream.seek(0)
        file = ipc.open_file(stream)
        schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        # A stream truncated between two batches differs from a complete one only in its end.
        stream.seek(-8, 2)
        if stream.read() != b"\xff\xff\xff\xff\0\0\0\0":
            raise DataError("damaged: an Arrow stream without its end")
        stream.seek(0)
        batches = ipc.open_stream(stream)
        schema = batches.schema
    _check_column(schema, text_field)
    yield from _table_rows(batches, text_field, limits)


def _seekable(stream: IO[bytes], limits: Limits) -> IO[bytes]:
    """Returns the stream, or its content in a file if it cannot seek: table formats are read from their end."""
    if stream.seekable():
        return stream
    with unnamed_file(limits) as file:
        shutil.copyfileobj(stream, file, _DRAIN_BYTES)
    file.seek(0)
    return file


def _check_column(schema: Any, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise DataError(
            f'no column "{text_field}", only {printable(", ".join(schema.names))}: name one as the text field'
        )
    kind = schema.field(text_field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(f'column "{text_field}" contains {printable(str(kind))}, not strings')


def _table_rows(batches: Any, text_field: str, limits: Limits) -> Iterator[_Row]:
    from pyarrow import large_binary, types

    number = 0
    for batch in batches:
        column = batch.column(text_field)
        indices: Any = range(len(column))
        if types.is_dictionary(column.type):
            indices, column = column.indices, column.dictionary
        # As bytes, since some writers do not check that strings are UTF-8.
        values = column.cast(large_binary())
        for index in indices:
            number += 1
            at = index if isinstance(index, int) else index.as_py()
            value = values[at].as_buffer() if at is not None and values[at].is_valid else None
            yield f":{number}", "text", _NO_TEXT if value is None else _value(value, limits)


def _value(value: Any, limits: Limits) -> Content:
    return too_long(limits.row_bytes) if value.size > limits.row_bytes else value.to_pybytes()


class _StrictInfo(tarfile.TarInfo):
    """Refuses what Python accepts: a damaged or missing header as the archive's end, and names of any size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.type in _HEADERS and info.size > _HEADER_BYTES:
            raise DataError(f"a header of {info.size:,} bytes, more than the limit of {_HEADER_BYTES:,}")
        return info

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise DataError(f"damaged: no tar header at byte {tar.offset:,}: {error}") from error


def _tar(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo) as tar:
        for key, members in itertools.groupby(_members(tar), lambda member: _split(member)[0]):
            key = printable(key)
            contents: dict[str, Content] = {}
            for member in members:
                extension = _split(member)[1]
                if extension in ("txt", "json"):
                    contents[extension] = _member(tar, member, extension, limits)
            if "txt" in contents:
                yield f":{key}.txt", "text", contents["txt"]
            elif "json" in contents:
                yield f":{key}.json", "json", contents["json"]
            else:
                yield f":{key}", "text", _NO_TEXT
        _check_end(tar)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined] # or all headers of the archive would stay in memory
        if not member.isdir():
            yield member


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str, limits: Limits) -> Content:
    if not member.isreg():
        return Unread("a link or special file, not a regular member")
    if member.issparse():
        return Unread("a sparse file, whose size its bytes do not bound")
    file = tar.extractfile(member)
    assert file is not None
    return read_content(file, limits) if extension == "txt" else read_row(file, limits)


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """Returns the key of a member's sample, and the member's extension, by the rules of WebDataset."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuses data after the end, since zeros in the middle of a damaged archive look like its end."""
    assert tar.fileobj is not None
    while rest := tar.fileobj.read(_DRAIN_BYTES):
        if rest.strip(b"\0"):
            raise DataError(f"damaged: more data after the tar's end at byte {tar.offset:,}")


def _topics(stream: IO[bytes], text_field: str, limits: Limits) -> Iterator[_Row]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"/{topic}", "text", topics[topic].encode()


_READERS: dict[str, _Reader] = {
    ".py": _python,
    ".json": _lines,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".tar": _tar,
    **dict.fromkeys((".md", ".rst", ".tex", ".txt"), _text),
    "topics": _topics,
}
"""By SourceFile.format; any other file is one text document, unless it contains JSON lines."""


def is_one_text(file: SourceFile) -> bool:
    """Returns whether the file is a single text, as far as its name tells."""
    return _reader(file) in (_text, _unknown)
