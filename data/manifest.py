"""Lists the files of a split; the list's digest identifies the corpus."""

import hashlib
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from triplane.storage.errors import DataError, printable
from triplane.storage.files import write_whole

Tokens = NDArray[np.unsignedinteger]
"""Token ids as stored."""

MANIFEST_NAME = "manifest.json"
Split = Literal["train", "validation"]

_FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}$")]
"""A bare name, so that a foreign corpus cannot refer to files outside its folder."""
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(gt=0, lt=1 << 50)]
"""Bytes, tokens or documents; sums of counts stay within 64 bits."""
_Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class StoredFile(BaseModel, extra="forbid", frozen=True, strict=True):
    """A file in the manifest's folder."""

    name: _FileName
    bytes: _Count
    sha256: _Sha256

    @classmethod
    def of(cls, path: Path) -> "StoredFile":
        """Describes a file on the disk."""
        return cls(name=path.name, bytes=path.stat().st_size, sha256=_sha256(path))

    def check_size(self, folder: Path) -> None:
        """Raises DataError if the file is missing or has another size."""
        path = folder / self.name
        try:
            stat = path.stat()
            found = f"{stat.st_size:,} bytes" if S_ISREG(stat.st_mode) else "no regular file"
        except OSError as error:
            found = "no file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        if found != (expected := f"{self.bytes:,} bytes"):
            raise damaged(path, expected, found)

    def check_content(self, folder: Path) -> None:
        """Reads the whole file; raises DataError if it is damaged."""
        self.check_size(folder)
        found = _sha256(folder / self.name)
        if found != self.sha256:
            raise damaged(folder / self.name, f"SHA-256 {self.sha256}", found)


class Shard(BaseModel, extra="forbid", frozen=True, strict=True):
    """A tar of tokens, its index, and their size."""

    data: StoredFile
    index: StoredFile
    documents: _Count
    tokens: _Count


class Manifest(BaseModel, extra="forbid", frozen=True, strict=True):
    """One split of a corpus; `shards` are in stored order.

    Fields that default to None are absent from corpora of earlier releases.
    """

    format: Literal[1] = 1
    split: Split | None = None
    tokenizer_digest: _Sha256
    tokenizer_files: Annotated[tuple[_FileName, ...], Field(min_length=1)] | None = None
    """Names of the tokenizer's files beside the splits; None means a sentencepiece model."""
    vocab_size: _Id
    bos_id: _Id
    """The first token of each document."""
    eos_id: _Id | None = None
    """The last token of each document, which may be `bos_id`; None means that it differs from `bos_id`."""
    text_bytes: _Count
    """UTF-8 bytes of all documents."""
    shards: Annotated[tuple[Shard, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        names = [file.name for shard in self.shards for file in (shard.data, shard.index)]
        if len(set(names)) < len(names):
            raise ValueError("a file is named twice")
        if max(self.bos_id, self.eos_id or 0) >= self.vocab_size:
            raise ValueError(f"bos_id or eos_id is not below vocab_size {self.vocab_size}")
        for number, shard in enumerate(self.shards):
            if not shard.documents <= shard.tokens <= shard.data.bytes // self.dtype.itemsize:
                raise ValueError(
                    f"shard {number}: {shard.documents:,} documents of {shard.tokens:,} tokens in {shard.data.bytes:,} "
                    f"bytes"
                )
        return self

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards, including bos and eos."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Type of the stored tokens."""
        return token_dtype(self.vocab_size)

    @cached_property
    def digest(self) -> str:
        """Identity of the corpus, which depends on text, order and tokenizer."""
        return hashlib.sha256(self._json()).hexdigest()

    @classmethod
    def parse(cls, content: bytes, where: str) -> "Manifest":
        """Parses a manifest; raises DataError, which names `where`, if this release cannot read it."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = printable(".".join(map(str, first["loc"])))
            reason = first["msg"].removeprefix("Value error, ")
            raise DataError(
                f"{where}: {f'{key}: ' if key else ''}{reason}: copy it again or prepare the corpus again"
            ) from error

    def save(self, folder: Path) -> None:
        """Writes the manifest; do so last, since a split without one counts as unfinished."""
        write_whole(folder / MANIFEST_NAME, self._json())

    def _json(self) -> bytes:
        return self.model_dump_json(indent=1, exclude_none=True).encode()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """Returns the smallest unsigned type that fits all ids."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def damaged(where: object, expected: str, found: str) -> DataError:
    """Returns the error for stored data that differs from what was written."""
    return DataError(f"{where}: damaged: expected {expected}, found {found}: copy it again or prepare the corpus again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
