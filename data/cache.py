"""Caches remote files on the local disk, fetched once for all processes of a node, within a size limit."""

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from triplane.data.config import DataConfig
from triplane.data.manifest import StoredFile
from triplane.storage.errors import DataError
from triplane.storage.files import replacing
from triplane.storage.remote import Retry, download

_OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.tmp")
_POLL_S = 0.02


@dataclass(frozen=True)
class Cache:
    """A folder of verified files, each named by its SHA-256; several processes and corpora may share it.

    A file in transfer has a temporary name, its full size from the start, so that it counts, and a lock that ends
    with its process. Beyond the limit, the least recently opened files are removed; a process that has mapped one can
    still read it, and its space is freed with the last mapping.
    """

    folder: Path
    limit_bytes: int
    retry: Retry

    @classmethod
    def of(cls, config: DataConfig) -> "Cache":
        """Returns the cache that a config describes."""
        retry = Retry(config.download_retries, config.download_timeout_s)
        return cls(Path(config.cache_dir).expanduser(), int(config.cache_gib * 2**30), retry)

    def open(self, url: str, file: StoredFile) -> BufferedReader:
        """Opens the cached copy of `url`, whose content is `file`; fetches it first if needed."""
        path = self.folder / file.sha256
        while True:
            with suppress(FileNotFoundError):
                os.utime(path)
                return open(path, "rb")
            self._make_folder()
            with _locked(_lock_of(path)):
                if not path.exists():
                    with replacing(path, file.bytes) as out:
                        self._reserve(out, file.bytes)
                        download(url, out, self.retry, sha256=file.sha256, size_bytes=file.bytes)

    def add(self, content: bytes) -> Path:
        """Stores the content of a small file; returns its path."""
        path = self.folder / hashlib.sha256(content).hexdigest()
        self._make_folder()
        with _locked(_lock_of(path)):
            if not path.exists():
                with replacing(path, len(content)) as out:
                    self._reserve(out, len(content))
                    out.write(content)
        return path

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot create it: {error.strerror}: set another data.cache_dir") from error

    def _reserve(self, out: BinaryIO, size_bytes: int) -> None:
        """Extends the empty `out` to its size once there is room, which may require waiting for other transfers."""
        if size_bytes > self.limit_bytes:
            raise DataError(
                f"{self.folder}: a file of {size_bytes:,} bytes does not fit into the cache of {self.limit_bytes:,}: "
                f"raise data.cache_gib"
            )
        with _locked(self.folder / ".room.lock"):
            while not self._make_room(size_bytes):
                time.sleep(_POLL_S)
            out.truncate(size_bytes)

    def _make_room(self, size_bytes: int) -> bool:
        """Removes the least recently opened files until `size_bytes` fit; False if files in transfer take the room."""
        held = []
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    found = path.stat()
                    if path.suffix == ".tmp" and _remove(path):
                        continue  # its process has died
                    held.append((found.st_mtime_ns, found.st_size, path))
        excess = sum(size for _, size, _ in held) + size_bytes - self.limit_bytes
        for _, size, path in sorted(held):
            if excess <= 0:
                break
            if _remove(path):
                excess -= size
        return excess <= 0


def _remove(path: Path) -> bool:
    """Removes a file unless a running process is fetching it."""
    if path.suffix != ".tmp":
        path.unlink(missing_ok=True)
        return True
    try:
        with _locked(path.with_suffix(".lock"), fcntl.LOCK_NB):
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    """Holds a lock against other processes and threads; the kernel releases it when the process dies."""
    while True:
        with open(path, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | flags)
            if not os.fstat(lock.fileno()).st_nlink:
                continue  # the last holder removed the file while this process waited
            try:
                yield
            finally:
                path.unlink()
                # A process forked in the meantime shares the lock, so closing the file would not release it.
                fcntl.flock(lock, fcntl.LOCK_UN)
            return
