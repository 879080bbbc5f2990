"""Writes files atomically: a file is complete on the disk, or absent."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from triplane.storage.errors import StorageError


@contextmanager
def replacing(path: Path, size_bytes: int) -> Iterator[BinaryIO]:
    """Yields a temporary file, renamed to `path` once it is complete and on the disk; an error leaves nothing behind.

    `size_bytes` is the expected size. Raises StorageError if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_full_is_an_error(path, size_bytes):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_full_is_an_error(path: Path, size_bytes: int | None = None) -> Iterator[None]:
    """Raises StorageError with the free space, and the needed space if known, when the disk fills up in the block."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        needed = "" if size_bytes is None else f"{size_bytes:,} needed, "
        raise StorageError(f"{path}: the disk is full: {needed}{free:,} bytes free") from error


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file atomically; raises StorageError if the disk is full."""
    with replacing(path, len(content)) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
