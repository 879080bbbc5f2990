"""Reads the files of a corpus from a local folder or a URL."""

from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from triplane.data.cache import Cache
from triplane.data.manifest import StoredFile
from triplane.storage.errors import DataError
from triplane.storage.remote import is_url, read_url

_MOST_BYTES = 1 << 28
"""Limit for files that are read into memory before their checksum is known: manifests and tokenizers."""


@dataclass(frozen=True)
class LocalFolder:
    """Files to read in place."""

    path: Path

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """Returns the content of a small file, unverified."""
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
        """Opens the file for mapping."""
        file.check_size(self.path)
        try:
            return open(self.path / file.name, "rb")
        except OSError as error:
            raise DataError(f"{self.path / file.name}: cannot be read: {error.strerror}") from error

    def where(self, file: StoredFile) -> str:
        """Names the file for an error about its content."""
        return str(self.path / file.name)


@dataclass(frozen=True)
class RemoteFolder:
    """Files to fetch when first opened."""

    url: str
    cache: Cache

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """Returns the content of a small file, uncached; retries if it does not match the checksum."""
        return read_url(f"{self.url}/{name}", self.cache.retry, most_bytes=_MOST_BYTES, sha256=sha256)

    def check_size(self, file: StoredFile) -> None:
        """Does nothing: a request per file would take long, and each file is verified when fetched."""

    def open(self, file: StoredFile) -> BufferedReader:
        """Opens the verified file in the cache for mapping."""
        return self.cache.open(f"{self.url}/{file.name}", file)

    def where(self, file: StoredFile) -> str:
        """Names the cached file for an error about its content: it was intact when fetched, so the disk is at fault."""
        return f"{self.cache.folder / file.sha256} (fetched from {self.url}/{file.name}; remove it)"


def folder_at(location: Path | str, cache: Cache | None) -> LocalFolder | RemoteFolder:
    """Returns the folder at a path, or at a URL, which requires a cache."""
    if not is_url(location):
        return LocalFolder(Path(location))
    assert cache is not None, f"{location}: no cache"
    return RemoteFolder(str(location).rstrip("/"), cache)


def join(location: Path | str, name: str) -> Path | str:
    """Joins a path or URL and `name`."""
    return f"{str(location).rstrip('/')}/{name}" if is_url(location) else Path(location) / name
