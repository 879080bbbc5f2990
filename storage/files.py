"""Files that appear whole or not at all."""

import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from triplane.storage.errors import BusyError, NoLocksError, StorageError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_FLOCK = "hhqqi4x"
"""Linux's struct flock: type, whence, start, length, pid."""
LOCK = "lock"
"""Name of the file in a folder that is, or was, held."""


@contextmanager
def replacing(path: Path, size_bytes: int) -> Iterator[BinaryIO]:
    """A file to write that takes the name `path` when it is complete and on the disk, and leaves nothing on an error.

    `size_bytes` is what it will need. Raises StorageError if the disk is full.
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
    """Raises StorageError, with what is needed (if that is known) and free, if what is written within has no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        needed = "" if size_bytes is None else f"{size_bytes:,} needed, "
        raise StorageError(f"{path}: the disk is full: {needed}{free:,} bytes free") from error


@contextmanager
def locked_folder(folder: Path, wait: bool) -> Iterator[None]:
    """Makes `folder` if need be and holds it: no other process, on any machine, gets it meanwhile.

    If another holds it, waits, or raises BusyError. Within, the holder may remove the folder. Raises NoLocksError where
    the file system has no locks, as Lustre mounted without them.
    """
    try:
        lock = None
        while lock is None:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / LOCK, wait)
    except BlockingIOError as error:
        raise BusyError(f"{folder}: another process is at work in there: wait for it to end") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(f"{folder}: this file system has no locks") from error
        raise StorageError(f"{error.filename or folder}: cannot write there: {error.strerror}") from error
    with lock:
        yield


def is_held(folder: Path) -> bool:
    """Whether another process holds `folder`; True where the file system cannot say.

    For processes that do not hold it themselves: closing the file would release their own lock.
    """
    try:
        with open(folder / LOCK, "rb") as file:
            return locked_by_another(file)
    except FileNotFoundError:
        return False


def locked_by_another(file: BinaryIO, start: int = 0, length: int = 0) -> bool:
    """Whether another process, of any machine, has locked some of these bytes (0: to the end).

    True where the file system cannot say.
    """
    asked = struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise
    return bool(answer[0] != fcntl.F_UNLCK)


def _lock(path: Path, wait: bool) -> TextIO | None:
    """The locked file, or None if a holder removed it meanwhile."""
    try:
        file = open(path, "a")  # noqa: SIM115 - closing it releases the lock
    except FileNotFoundError:
        return None
    # A POSIX lock works over NFS, and forked workers do not keep it when this process is killed.
    fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    if _is_named(file.fileno(), path):
        return file
    file.close()
    return None


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is never seen half written; StorageError if the disk is full."""
    with replacing(path, len(content)) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Puts a file's content, or the names in a folder, on the disk, so that a rename outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
