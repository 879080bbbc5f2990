"""The list of a split's files: what a corpus is made of, and by its digest which corpus it is."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from triplane.data.errors import DataError
from triplane.data.files import write_whole

Tokens = NDArray[np.unsignedinteger]
"""Ids as they are stored."""

MANIFEST_NAME = "manifest.json"


class StoredFile(BaseModel, extra="forbid", frozen=True):
    """A file beside the manifest."""

    name: str
    bytes: PositiveInt
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """Describes `path` as it is on the disk."""
        return cls(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))

    def check_size(self, folder: Path) -> None:
        """Raises DataError if the file is missing or has another size."""
        path = folder / self.name
        found = f"{path.stat().st_size:,} bytes" if path.exists() else "no file"
        if found != (expected := f"{self.bytes:,} bytes"):
            raise damaged(path, expected, found)

    def check_content(self, folder: Path) -> None:
        """Reads the whole file; raises DataError if it is not what was written."""
        self.check_size(folder)
        found = _sha256(folder / self.name)
        if found != self.sha256:
            raise damaged(folder / self.name, f"SHA-256 {self.sha256}", found)


class Shard(BaseModel, extra="forbid", frozen=True):
    """A tar of tokens, its index, and how much is in it."""

    data: StoredFile
    index: StoredFile
    documents: PositiveInt
    tokens: PositiveInt


class Manifest(BaseModel, extra="forbid", frozen=True):
    """One split of a corpus. Stored order is the order of `shards`."""

    format: Literal[1] = 1
    tokenizer_digest: str
    vocab_size: PositiveInt
    bos_id: NonNegativeInt
    """The first token of each document."""
    text_bytes: PositiveInt
    """UTF-8 bytes of all documents."""
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards, bos and eos of each document among them."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of the stored tokens."""
        return token_dtype(self.vocab_size)

    @cached_property
    def digest(self) -> str:
        """The corpus's identity: another text, order or tokenizer has another one."""
        return hashlib.sha256(self._json()).hexdigest()

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Manifest":
        """Raises DataError, which names `where`, if this release can't read it."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"{where}: {key}: {first['msg']}: prepare the corpus again") from error

    def save(self, folder: Path) -> None:
        """Written last: a split without it is unfinished."""
        write_whole(folder / MANIFEST_NAME, self._json())

    def _json(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned type that holds all ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def damaged(where: object, expected: str, found: str) -> DataError:
    """The error for stored data that is not what was written."""
    return DataError(f"{where}: damaged: expected {expected}, found {found}: copy it again or prepare the corpus again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
