"""Locks on folders and files that exclude other processes, on this machine and over NFS."""

import errno
import fcntl
import os
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
"""Name of the lock file in a folder."""


@contextmanager
def locked_folder(folder: Path, *, wait: bool) -> Iterator[None]:
    """Holds `folder`, created if missing, so that no other process on any machine can hold it.

    If another process holds it, waits or raises BusyError. The holder may remove the folder. Raises NoLocksError on a
    file system without locks, such as Lustre mounted without them.
    """
    try:
        lock = None
        while lock is None:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder / LOCK, wait)
    except BlockingIOError as error:
        raise BusyError(f"{folder}: in use by another process: wait for it to end") from error
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocksError(f"{folder}: this file system has no locks") from error
        raise StorageError(f"{error.filename or folder}: cannot write there: {error.strerror}") from error
    with lock:
        yield


def is_held(folder: Path) -> bool:
    """Whether another process holds `folder`; True where the file system cannot say.

    Not for the holder itself: closing the file would release its own lock.
    """
    try:
        with open(folder / LOCK, "rb") as file:
            return locked_by_another(file)
    except FileNotFoundError:
        return False


def locked_by_another(file: BinaryIO, start: int = 0, length: int = 0) -> bool:
    """Whether a process on any machine has locked some of these bytes (length 0: to the end of the file).

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
    """Returns the locked file, or None if its last holder removed it in the meantime."""
    try:
        file = open(path, "a")  # noqa: SIM115 - closing it releases the lock
    except FileNotFoundError:
        return None
    # POSIX locks work over NFS, and forked workers do not inherit them when this process is killed.
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
