"""Where the files of a corpus are: in a folder of this machine, or at a URL."""

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from triplane.data.cache import Cache
from triplane.data.manifest import StoredFile
from triplane.storage.errors import DataError
from triplane.storage.remote import is_url, read_url

_MOST_BYTES = 1 << 28
"""Of a file that is read into memory before its checksum is known: a manifest, or one of a tokenizer's."""


@dataclass(frozen=True)
class LocalFolder:
    """Files that are read in place."""

    path: Path

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """The content of a small file; the caller checks it."""
        path = self.path / name
        try:
            if path.exists() and not path.is_file():
                raise DataError(f"{path}: not a regular file: write a corpus there with `triplane prepare`")
            with open(path, "rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: write a corpus there with `triplane prepare`") from error
        if len(content) > _MOST_BYTES:
            raise DataError(f"{path}: more than {_MOST_BYTES:,} bytes: prepare the corpus again")
        return content

    def check_size(self, file: StoredFile) -> None:
        """Raises DataError if the file is missing or has another size."""
        file.check_size(self.path)

    def open(self, file: StoredFile) -> BufferedReader:
        """The file, to be mapped."""
        file.check_size(self.path)
        try:
            return open(self.path / file.name, "rb")
        except OSError as error:
            raise DataError(f"{self.path / file.name}: cannot be read: {error.strerror}") from error

    def where(self, file: StoredFile) -> str:
        """How an error about its content names the file."""
        return str(self.path / file.name)


@dataclass(frozen=True)
class RemoteFolder:
    """Files that are fetched when they are first opened."""

    url: str
    cache: Cache

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """The content of a small file, which is not kept; one without this checksum is fetched again."""
        return read_url(f"{self.url}/{name}", self.cache.retry, most_bytes=_MOST_BYTES, sha256=sha256)

    def check_size(self, file: StoredFile) -> None:
        """Nothing: to ask for each of many files would take long, and each is verified when it is fetched."""

    def open(self, file: StoredFile) -> BufferedReader:
        """The verified file in the cache, to be mapped."""
        return self.cache.open(f"{self.url}/{file.name}", file)

    def where(self, file: StoredFile) -> str:
        """How an error about its content names the file: it was whole when it was fetched, so the disk is to blame."""
        return f"{self.cache.folder / file.sha256} (fetched from {self.url}/{file.name}; remove it)"


def folder_at(location: Path | str, cache: Cache | None) -> LocalFolder | RemoteFolder:
    """The folder at a path, or at a URL, for which a cache is needed."""
    if not is_url(location):
        return LocalFolder(Path(location))
    assert cache is not None, f"{location}: no cache"
    return RemoteFolder(str(location).rstrip("/"), cache)


def join(location: Path | str, name: str) -> Path | str:
    """What is called `name` in a folder at a path or URL."""
    return f"{str(location).rstrip('/')}/{name}" if is_url(location) else Path(location) / name
