"""Append-only files and a state that reach the disk together: a killed program goes on from its last commit."""

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
        """Cuts what was appended after the last commit, at which there were `size` bytes."""
        self.path = path
        self.size = size
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close
        if os.fstat(self._file.fileno()).st_size < size:
            raise DataError(f"{path}: damaged: expected at least {size:,} bytes: remove {path.parent} to start again")
        self.cut()

    def append(self, content: bytes) -> None:
        """The content may stay in memory until the next commit."""
        with disk_full_is_an_error(self.path, len(content)):
            self._file.write(content)
        self.size += len(content)

    def read(self, start: int = 0, size: int = -1) -> bytes:
        """Bytes from `start` on, those that were just appended too."""
        self.flush()
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)

    def open(self) -> BinaryIO:
        """The file, with what was just appended; what is after `size` does not count."""
        self.flush()
        return open(self.path, "rb")

    def flush(self) -> None:
        """Other readers of the file see everything from here on."""
        with disk_full_is_an_error(self.path, self.size):
            self._file.flush()

    def restart(self) -> None:
        """Drops the content once the next commit has been made."""
        self.size = 0

    def sync(self) -> None:
        """Puts everything on the disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def cut(self) -> None:
        """Drops what is after `size`."""
        self._file.flush()
        if os.fstat(self._file.fileno()).st_size > self.size:
            self._file.truncate(self.size)

    def close(self) -> None:
        """Puts everything on the disk and closes the file."""
        self.sync()
        self._file.close()


class _Saved(BaseModel, extra="forbid", frozen=True):
    logs: dict[str, int] = {}
    state: dict[str, Any] | None = None


class Journal:
    """The logs and the state of a piece of work, in its folder."""

    def __init__(self, folder: Path):
        """`state` is that of the last commit, None if there was none."""
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
        """Whether there is a commit to go on from."""
        return (folder / _NAME).exists()

    @staticmethod
    def remove(folder: Path) -> None:
        """Forgets what was committed."""
        (folder / _NAME).unlink(missing_ok=True)

    def log(self, name: str) -> Log:
        """The log of that name, as it was at the last commit."""
        assert name not in self._logs
        self._logs[name] = Log(self.folder / name, self._sizes.get(name, 0))
        return self._logs[name]

    def commit(self, state: BaseModel) -> None:
        """From here on, a new Journal has this state and everything that is in the logs."""
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
