"""File operations on local paths and fsspec URLs alike, for checkpoints."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

from upath import UPath

from triplane.storage.errors import CheckpointError, OutOfReachError
from triplane.storage.files import sync
from triplane.storage.foreign import regular_file
from triplane.storage.remote import in_short, is_url

Location: TypeAlias = Path | UPath

_CHUNK_BYTES = 2**20
"""Small enough to still be in the CPU cache when its checksum is computed."""
_REQUEST_BYTES = 64 * 2**20
"""Size of one transfer to or from a URL."""


def location(text: str) -> Location:
    """Parses a path or URL. Raises CheckpointError if the package for the URL's protocol is missing."""
    if not is_url(text):
        return Path(text)
    try:
        remote = UPath(text, use_listings_cache=False)  # other machines write there too
        assert remote.fs is not None
    except (ImportError, ValueError) as error:
        package = "pip install 'triplane[s3]'" if text.startswith("s3:") else "install fsspec's package for it"
        raise CheckpointError(f"{text}: cannot be reached from here: {error}: {package}") from error
    return remote


@contextmanager
def reaching(path: Location) -> Iterator[None]:
    """Turns what a protocol's package raises, other than FileNotFoundError, into OutOfReachError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        raise OutOfReachError(f"{path}: out of reach: {in_short(error)}") from error


def entries(folder: Location) -> dict[str, int]:
    """Maps the names in a folder to file sizes, -1 for a dangling link; empty if the folder is missing."""
    try:
        if isinstance(folder, Path):
            return {entry.name: _size(entry) for entry in os.scandir(folder)}
        with reaching(folder):
            listed = folder.fs.ls(folder.path, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        raise CheckpointError(f"{folder}: {error.strerror}; make it readable") from error
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] or 0 for entry in listed}


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def fill(path: Location, begin: int, target: memoryview) -> Iterator[memoryview]:
    """Reads a file into `target`, starting at byte `begin`; yields each part as it arrives, until the file ends."""
    if isinstance(path, Path):
        # Under a memory map, a failing disk would raise a signal instead of an error.
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while count := file.readinto(target[:_CHUNK_BYTES]):
                yield target[:count]
                target = target[count:]
        return
    for start in range(0, len(target), _REQUEST_BYTES):
        part = target[start : start + _REQUEST_BYTES]
        with reaching(path):
            content = path.fs.cat_file(path.path, start=begin + start, end=begin + start + len(part))
        part[: len(content)] = content
        yield part[: len(content)]


def read(path: Location) -> bytes:
    """Reads a small file; raises CheckpointError if it is unreadable, a pipe or a dangling link."""
    if isinstance(path, Path):
        regular_file(path)
    try:
        with reaching(path):
            return path.read_bytes()
    except PermissionError as error:
        raise CheckpointError(f"{path}: {error.strerror}; make it readable") from error


@contextmanager
def writing(path: Location) -> Iterator[BinaryIO]:
    """Yields a file to write, which survives a power failure once the block has ended."""
    if isinstance(path, Path):
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
        return
    with reaching(path), path.fs.open(path.path, "wb", block_size=_REQUEST_BYTES) as remote:
        yield cast(BinaryIO, remote)


def rename(folder: Location, name: str) -> Location:
    """Renames a folder of files; at a URL, copies and then deletes them."""
    if isinstance(folder, Path):
        renamed = folder.rename(folder.with_name(name))
        sync(folder.parent)
        return renamed
    moved = folder.with_name(name)
    names = list(entries(folder))
    with reaching(folder):
        folder.fs.copy([(folder / name).path for name in names], [(moved / name).path for name in names])
    remove(folder)
    return moved


def remove(folder: Location) -> None:
    """Deletes a folder and its content."""
    if isinstance(folder, Path):
        shutil.rmtree(folder)
        return
    with reaching(folder):
        folder.fs.rm(folder.path, recursive=True)
