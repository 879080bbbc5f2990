"""Commits append-only files and a state to the disk together, so that a killed program resumes from the last commit."""

import os
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel

from triplane.storage.errors import DataError
from triplane.storage.files import disk_full_is_an_error, write_whole

_NAME = "journal.json"


class Log:
    """A file that is only appended to."""

    def __init__(self, path: Path, size: int):
        """Truncates the file to `size`, its length at the last commit."""
        self.path = path
        self.size = size
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close
        if os.fstat(self._file.fileno()).st_size < size:
            raise DataError(f"{path}: damaged: expected at least {size:,} bytes: remove {path.parent} to start again")
        self.cut()

    def append(self, content: bytes) -> None:
        """Appends `content`, which may stay in memory until the next commit."""
        with disk_full_is_an_error(self.path, len(content)):
            self._file.write(content)
        self.size += len(content)

    def read(self, start: int = 0, size: int = -1) -> bytes:
        """Reads `size` bytes from `start`, including those just appended."""
        self.flush()
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def open(self) -> BinaryIO:
        """Opens the file for reading; content beyond `self.size` is invalid."""
        self.flush()
        return open(self.path, "rb")

    def flush(self) -> None:
        """Makes all content visible to other readers of the file."""
        with disk_full_is_an_error(self.path, self.size):
            self._file.flush()

    def restart(self) -> None:
        """Drops the content with the next commit."""
        self.size = 0

    def sync(self) -> None:
        """Flushes everything to the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def cut(self) -> None:
        """Truncates the file to `size`."""
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size > self.size:
            self._file.truncate(self.size)

    def close(self) -> None:
        """Flushes everything to the disk and closes the file."""
        self.sync()
        self._file.close()


class _Saved(BaseModel, extra="forbid", frozen=True):
    logs: dict[str, int] = {}
    state: dict[str, Any] | None = None


class Journal:
    """The logs and state of an ongoing task, in its folder."""

    def __init__(self, folder: Path):
        """`state` is that of the last commit, or None."""
        self.folder = folder
        self._path = folder / _NAME
        saved = (
            _Saved.model_validate_json(self._path.read_bytes()) if self._path.exists() else _Saved(logs={}, state={})
        )
        self.state = saved.state or None
        self._sizes = saved.logs
        self._logs: dict[str, Log] = {}

    @staticmethod
    def exists(folder: Path) -> bool:
        """Returns whether there is a commit to resume from."""
        return (folder / _NAME).exists()

    @staticmethod
    def remove(folder: Path) -> None:
        """Forgets what was committed."""
        (folder / _NAME).unlink(missing_ok=True)

    def log(self, name: str) -> Log:
        """Opens the log of that name, as it was at the last commit."""
        assert name not in self._logs
        self._logs[name] = Log(self.folder / name, self._sizes.get(name, 0))
        return self._logs[name]

    def commit(self, state: BaseModel) -> None:
        """Commits this state and the content of the logs, from which a new Journal then resumes."""
        for log in self._logs.values():
            log.sync()
        saved = _Saved(logs={name: log.size for name, log in self._logs.items()}, state=state.model_dump(mode="json"))
        write_whole(self._path, saved.model_dump_json().encode())
        for log in self._logs.values():
            log.cut()

    def close(self) -> None:
        """Closes the logs."""
        for log in self._logs.values():
            log.close()
