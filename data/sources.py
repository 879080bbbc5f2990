"""Finds the files of inputs, in a fixed order."""

import fnmatch
import glob
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from stat import S_ISREG
from typing import Any, NamedTuple

import braceexpand
import fsspec
from fsspec.implementations.local import LocalFileSystem

from triplane.data.decompression import COMPRESSIONS
from triplane.data.records import Rejection
from triplane.storage.errors import DataError, TriplaneError, printable

PYTHON_STDLIB = "python-stdlib"
"""Input available on every machine: sources and documentation of Python's standard library, about 12 MB."""

FORMATS = (".arrow", ".jsonl", ".md", ".ndjson", ".parquet", ".py", ".rst", ".tar", ".tex", ".txt")
"""Suffixes read in folders. A file named as an input is read whatever its suffix, `.json` as JSON lines."""

_VERSION_KEYS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "mtime", "created")
"""Keys by which fsspec's stores show that a file has changed."""

_STDLIB_SKIPPED = frozenset(("dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"))


class SourceFile(NamedTuple):
    """A file of documents."""

    name: str
    """Name for people."""
    path: str
    """A local path or a URL."""
    format: str
    """The suffix that determines its reader, without that of a compression."""
    size: int | None
    """Bytes, None if the server does not report it."""
    version: str
    """Changes with the content."""
    part: range | None = None
    """Bytes of the file that it consists of; None for all."""


def find_files(inputs: Sequence[str], reject: Callable[[Rejection], object]) -> list[SourceFile]:
    """Returns the files of each input in turn; passes files of other formats in folders to `reject`.

    An input is a file, a folder (its files at all depths, sorted, without hidden ones) or a pattern with `*`, `?`,
    `[...]` or `{...}`, each as a local path or an fsspec URL, or PYTHON_STDLIB. Raises DataError for an input that is
    missing or has no file of documents.
    """
    files: list[SourceFile] = []
    for name in inputs:
        found = list(_find(name, reject))
        if not found:
            raise DataError(f"{name}: contains no file that ends in {', '.join(FORMATS)}")
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
                    yield from _described(store, match, reject)
                elif reason := store.problem(match):
                    raise DataError(f"{match}: {reason}")
                else:
                    yield store.describe(match)
    except TriplaneError:
        raise
    except Exception as error:  # each store raises its own exceptions
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{getattr(error, 'filename', None) or name}: cannot read this input: {reason}") from error


def _described(store: "_Local | _Remote", folder: str, reject: Callable[[Rejection], object]) -> Iterator[SourceFile]:
    for path in store.walk(folder):
        if PurePosixPath(path).match("cache-*.arrow"):
            reason: str | None = "a cache of Hugging Face datasets"
        elif format_of(path) not in FORMATS:
            reason = f"no document format: {PurePosixPath(path).suffix or 'no suffix'}"
        else:
            reason = store.problem(path)
        if reason:
            reject(Rejection(name=_spelled(path), reason=reason))
        else:
            yield store.describe(path)


def _spelled(path: str) -> str:
    """Returns a name that can be printed and stored, with bytes that are not UTF-8 as `\\xff`."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"))


def format_of(path: str) -> str:
    """Returns the suffix of `path` in lower case, without that of a compression."""
    pure = PurePosixPath(path.lower())
    return pure.with_suffix("").suffix if pure.suffix in COMPRESSIONS else pure.suffix


class _Local:
    """Local files."""

    def exists(self, path: str) -> bool:
        return os.path.lexists(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        start, stars, _ = pattern.partition("**")
        if not stars:
            return sorted(glob.glob(pattern))
        folders = [folder for folder in glob.glob(os.path.dirname(start) or ".") if os.path.isdir(folder)]
        matches = re.compile(_deep_pattern(pattern)).fullmatch
        return [path for folder in sorted(folders) for path in self.walk(folder) if matches(path.removeprefix("./"))]

    def walk(self, folder: str) -> list[str]:
        return sorted(_walk(folder, set()))

    def problem(self, path: str) -> str | None:
        """Returns why a file cannot be read, or None if no reason is known."""
        return None if S_ISREG(os.stat(path).st_mode) else "not a regular file"

    def describe(self, path: str) -> SourceFile:
        return _local_file(_spelled(path), path, format_of(path))


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yields the files at all depths of `folder`, without hidden ones; follows links, but visits each folder once."""
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    below: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                below.append(entry.path)
            else:
                yield entry.path
    # Real folders first, so that a document is named by its own path, not a link's.
    for path in sorted(below, key=lambda path: (os.path.islink(path), path)):
        yield from _walk(path, seen)


def _deep_pattern(pattern: str) -> str:
    """Translates a pattern in which `**` matches folders at any depth to a regular expression."""
    parts = [
        "(?:[^/.][^/]*/)*" if part == "**" else fnmatch.translate(part).removesuffix(r"\Z").replace(".*", "[^/]*") + "/"
        for part in pattern.removeprefix("./").split("/")
    ]
    return "".join(parts).removesuffix("/") + ("[^/]+" if pattern.endswith("**") else "")


class _Remote:
    """Files of an fsspec store."""

    def __init__(self, fs: Any):
        self._fs = fs

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(path))

    def is_folder(self, path: str) -> bool:
        # fsspec may take a document on a web server for a folder, whose URL would end in a slash.
        return bool(self._fs.isdir(path)) and format_of(path) not in FORMATS

    def glob(self, pattern: str) -> list[str]:
        return sorted(self._fs.glob(pattern)) if glob.has_magic(pattern) else []

    def walk(self, folder: str) -> list[str]:
        paths = self._fs.find(folder)
        return sorted(path for path in paths if not any(part.startswith(".") for part in path.split("/")))

    def problem(self, path: str) -> str | None:
        """Returns None: nothing is known before the file is read."""
        return None

    def describe(self, path: str) -> SourceFile:
        info = self._fs.info(path)
        url = self._fs.unstrip_protocol(path)
        version = " ".join(str(info[key]) for key in _VERSION_KEYS if key in info)
        return SourceFile(name=url, path=url, format=format_of(path), size=info.get("size"), version=version)


def _local_file(name: str, path: str, format: str) -> SourceFile:
    stat = os.stat(path)
    return SourceFile(name=name, path=path, format=format, size=stat.st_size, version=str(stat.st_mtime_ns))


def _stdlib() -> Iterable[SourceFile]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _STDLIB_SKIPPED.intersection(relative.parts):
            yield _local_file(f"{PYTHON_STDLIB}/{relative}", str(path), ".py")
    yield _local_file(f"{PYTHON_STDLIB}/topics", str(root / "pydoc_data" / "topics.py"), "topics")
