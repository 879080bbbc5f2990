"""Which files the inputs stand for, always in the same order."""

import glob
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem

from triplane.data.errors import DataError
from triplane.data.records import Rejection

PYTHON_STDLIB = "python-stdlib"
"""The input that every machine has: the sources and documentation of Python's standard library, about 12 MB."""

FORMATS = (".arrow", ".jsonl", ".md", ".parquet", ".py", ".rst", ".tar", ".tex", ".txt")
"""What is read in a folder. A file that is named as an input is read whatever its suffix."""

COMPRESSIONS = {".bz2": "bz2", ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
"""Suffixes that may follow, and fsspec's names of what they stand for."""

_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "created")
"""Where the stores that fsspec reaches tell that a file has changed."""

_STDLIB_SKIPPED = frozenset(("dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"))


class SourceFile(NamedTuple):
    """A file of documents."""

    name: str
    """What a person calls it."""
    path: str
    """A local path or a URL."""
    format: str
    """The suffix that says how it is read, without that of a compression."""
    size: int | None
    """Bytes, None if its server does not tell."""
    version: str
    """Another one when the content has changed."""


def find_files(inputs: Sequence[str], reject: Callable[[Rejection], object]) -> list[SourceFile]:
    """The files of each input in turn; files in folders that hold no documents go to `reject`.

    An input is a file, a folder (its files in all depths, sorted; hidden ones are left out), a pattern with `*`, `?`,
    `[...]` or `{...}`, each on this machine or as a URL that fsspec knows, or PYTHON_STDLIB. Raises DataError for an
    input that is missing or holds no file of documents.
    """
    files: list[SourceFile] = []
    for name in inputs:
        found = list(_find(name, reject))
        if not found:
            raise DataError(f"{name}: no file in there ends in {', '.join(FORMATS)}")
        files += found
    return files


def _find(name: str, reject: Callable[[Rejection], object]) -> Iterator[SourceFile]:
    if name == PYTHON_STDLIB:
        yield from _stdlib()
        return
    try:
        fs, path = fsspec.url_to_fs(name)
        store = _Local() if isinstance(fs, LocalFileSystem) else _Remote(fs)
        for pattern in [path] if store.exists(path) or "{" not in path else braceexpand.braceexpand(path):
            matches = [pattern] if store.exists(pattern) else store.glob(pattern)
            if not matches:
                raise DataError(f"{name}: no such input; it must be a file, a folder, a URL or {PYTHON_STDLIB}")
            for match in matches:
                if store.is_folder(match):
                    yield from map(store.describe, _documents(store, match, reject))
                else:
                    yield store.describe(match)
    except DataError:
        raise
    except Exception as error:  # each store has errors of its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{getattr(error, 'filename', None) or name}: cannot read this input: {reason}") from error


def _documents(store: "_Local | _Remote", folder: str, reject: Callable[[Rejection], object]) -> Iterator[str]:
    for path in store.walk(folder):
        if PurePosixPath(path).match("cache-*.arrow"):
            reject(Rejection(name=path, reason="a cache of Hugging Face datasets"))
        elif format_of(path) in FORMATS:
            yield path
        else:
            reject(Rejection(name=path, reason=f"no document format: {PurePosixPath(path).suffix or 'no suffix'}"))


def format_of(path: str) -> str:
    """The suffix of `path` without that of a compression."""
    pure = PurePosixPath(path)
    return pure.with_suffix("").suffix if pure.suffix in COMPRESSIONS else pure.suffix


class _Local:
    """Files of this machine."""

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        return sorted(glob.glob(pattern, recursive=True))

    def walk(self, folder: str) -> list[str]:
        # Follows links to folders, as collections of text often are: fsspec's own does not.
        paths = glob.glob(f"{glob.escape(folder)}/**/*", recursive=True)
        return sorted(path for path in paths if not os.path.isdir(path))

    def describe(self, path: str) -> SourceFile:
        return _local_file(path, path, format_of(path))


class _Remote:
    """Files of a store that fsspec reaches."""

    def __init__(self, fs: Any):
        self._fs = fs

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(path))

    def is_folder(self, path: str) -> bool:
        # A web server's page may look like a listing of others: a folder's URL ends in a slash there.
        return bool(self._fs.isdir(path)) and format_of(path) not in FORMATS

    def glob(self, pattern: str) -> list[str]:
        return sorted(self._fs.glob(pattern)) if glob.has_magic(pattern) else []

    def walk(self, folder: str) -> list[str]:
        paths = self._fs.find(folder)
        return sorted(path for path in paths if not any(part.startswith(".") for part in path.split("/")))

    def describe(self, path: str) -> SourceFile:
        info = self._fs.info(path)
        url = self._fs.unstrip_protocol(path)
        version = " ".join(str(info[key]) for key in _VERSION_KEYS if key in info)
        return SourceFile(url, url, format_of(path), info.get("size"), version)


def _local_file(name: str, path: str, format: str) -> SourceFile:
    stat = os.stat(path)
    return SourceFile(name, path, format, stat.st_size, str(stat.st_mtime_ns))


def _stdlib() -> Iterable[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _STDLIB_SKIPPED.intersection(relative.parts):
            yield _local_file(f"{PYTHON_STDLIB}/{relative}", str(path), ".py")
    yield _local_file(f"{PYTHON_STDLIB}/topics", str(root / "pydoc_data" / "topics.py"), "topics")
