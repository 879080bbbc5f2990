"""Files that appear whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from triplane.data.errors import DataError


@contextmanager
def replacing(path: Path, size_bytes: int) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when it is complete and on the disk, and leaves nothing on an error.

    `size_bytes` is what it will need. Raises DataError if the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise DataError(f"{path}: the disk is full: {size_bytes:,} bytes needed, {free:,} free") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when it is complete, and is removed on an error.

    `path` must not exist, or be an empty folder. What an earlier, killed writer left is removed first.
    """
    path = path.resolve()
    staging = path.with_name(f"{path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(path)
        sync_folder(path.parent)
    except PermissionError as error:
        raise DataError(f"{error.filename}: cannot write there: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written; DataError if the disk is full."""
    with replacing(path, len(content)) as file:
        file.write(content)


def sync_folder(folder: Path) -> None:
    """Puts the names in `folder` on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
