"""The records of each kind of file, always in the same order; what is damaged raises and is never passed over.

A library that only one kind of file needs is imported when there is one.
"""

import itertools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import IO, Any, Literal

import fsspec
from fsspec.compression import compr

from triplane.data.errors import DataError
from triplane.data.records import Position, Record
from triplane.data.sources import COMPRESSIONS, SourceFile

_Row = tuple[str, Literal["text", "python", "json"], bytes | None]
"""The end of its name, its kind and its content."""

_ROWS = 1024
"""Rows of a table that are in memory at once."""
_DRAIN_BYTES = 1 << 20


def read_records(files: Sequence[SourceFile], text_field: str, start: Position) -> Iterator[Record]:
    """Yields the records of `files` from `start` on; raises DataError if one can't be read to its end."""
    before_bytes = sum(file.size or 0 for file in files[: start.file])
    for number, file in enumerate(files[start.file :], start.file):
        skipped = start.records if number == start.file else 0
        try:
            with _open(file.path) as raw, closing(_decompressed(raw, file)) as stream:
                rows = itertools.islice(_reader(file)(stream, text_field), skipped, None)
                for count, (suffix, kind, content) in enumerate(rows, skipped + 1):
                    yield Record(file.name + suffix, kind, content, Position(number, count), before_bytes + raw.tell())
        except DataError as error:
            raise DataError(f"{file.name}: {error}") from error
        except Exception as error:  # each format, compression and protocol has errors of its own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{file.name}: cannot read this input: {reason}") from error
        before_bytes += file.size or 0


def _open(path: str) -> IO[bytes]:
    if "://" not in path:
        return open(path, "rb")
    fs, path = fsspec.url_to_fs(path)
    file: IO[bytes] = fs.open(path, "rb")
    return file


def _decompressed(raw: IO[bytes], file: SourceFile) -> IO[bytes]:
    for suffix, compression in COMPRESSIONS.items():
        if file.path.endswith(suffix):
            stream: IO[bytes] = compr[compression](raw, mode="rb")
            return stream
    return raw


def _reader(file: SourceFile) -> Callable[[IO[bytes], str], Iterator[_Row]]:
    return _READERS.get(file.format, _text)


def _text(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    yield "", "text", stream.read()


def _python(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    yield "", "python", stream.read()


def _lines(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    for number, line in enumerate(stream, 1):
        yield f":{number}", "json", line


def _parquet(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(stream)
    _check_column(file.schema_arrow, text_field)
    yield from _table_rows(file.iter_batches(_ROWS, columns=[text_field]), text_field)


def _arrow(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    from pyarrow import ipc

    if stream.read(6) == b"ARROW1":
        stream.seek(0)
        file = ipc.open_file(stream)
        schema, batches = file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        # A stream that was cut between two batches reads like a whole one, but for its end.
        stream.seek(-8, 2)
        if stream.read() != b"\xff\xff\xff\xff\0\0\0\0":
            raise DataError("damaged: an Arrow stream without its end")
        stream.seek(0)
        batches = ipc.open_stream(stream)
        schema = batches.schema
    _check_column(schema, text_field)
    yield from _table_rows(batches, text_field)


def _check_column(schema: Any, text_field: str) -> None:
    from pyarrow import types

    if text_field not in schema.names:
        raise DataError(f'no column "{text_field}"; there are {", ".join(schema.names)}: name one as the text field')
    kind = schema.field(text_field).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        raise DataError(f'column "{text_field}" holds {kind}, not strings')


def _table_rows(batches: Any, text_field: str) -> Iterator[_Row]:
    from pyarrow import large_binary

    number = 0
    for batch in batches:
        # As bytes, since not every writer checks that strings are UTF-8.
        for content in batch.column(text_field).cast(large_binary()).to_pylist():
            number += 1
            yield f":{number}", "text", content


class _StrictInfo(tarfile.TarInfo):
    """Python takes a damaged header, or none, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise DataError(f"damaged: no tar header at byte {tar.offset:,}: {error}") from error


def _tar(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo) as tar:
        for key, members in itertools.groupby(filter(tarfile.TarInfo.isreg, tar), lambda member: _split(member)[0]):
            contents: dict[str, bytes] = {}
            for member in members:
                extension = _split(member)[1]
                file = tar.extractfile(member)
                assert file is not None
                contents[extension] = file.read() if extension in ("txt", "json") else b""
            if "txt" in contents:
                yield f":{key}.txt", "text", contents["txt"]
            elif "json" in contents:
                yield f":{key}.json", "json", contents["json"]
            else:
                yield f":{key}", "text", None
        _check_end(tar)


def _split(member: tarfile.TarInfo) -> tuple[str, str]:
    """The key of the sample that a member belongs to, and its extension, by the rules of WebDataset."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def _check_end(tar: tarfile.TarFile) -> None:
    """Zeros in the middle of a damaged archive look like its end, but for what follows them."""
    assert tar.fileobj is not None
    while rest := tar.fileobj.read(_DRAIN_BYTES):
        if rest.strip(b"\0"):
            raise DataError(f"damaged: more data after the tar's end at byte {tar.offset:,}")


def _topics(stream: IO[bytes], text_field: str) -> Iterator[_Row]:
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"/{topic}", "text", topics[topic].encode()


_READERS: dict[str, Callable[[IO[bytes], str], Iterator[_Row]]] = {
    ".py": _python,
    ".jsonl": _lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".tar": _tar,
    "topics": _topics,
}
"""By SourceFile.format; any other file is one document of text."""
