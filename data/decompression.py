"""Decompresses files to their end; damage, or data after the last stream, raises."""

import bz2
import io
import lzma
from collections.abc import Callable
from typing import IO, Any, Protocol

from fsspec.compression import compr

_CHUNK_BYTES = 1 << 16
_LZMA_MEMORY_BYTES = 1 << 28
"""Limit for the dictionary, whose size the file chooses; `xz -9` uses a quarter of it."""

COMPRESSIONS = {".bz2": "bz2", ".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
"""Suffix to fsspec's name of the compression."""


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """Returns the decompressed content of `raw`, whose name ends in `suffix`."""
    match suffix:
        case ".bz2":
            return io.BufferedReader(_Streams(raw, bz2.BZ2Decompressor))
        case ".xz":
            return io.BufferedReader(_Streams(raw, lambda: lzma.LZMADecompressor(memlimit=_LZMA_MEMORY_BYTES)))
        case ".gz" | ".zst":
            return compr[COMPRESSIONS[suffix]](raw, mode="rb")
    return raw


class _Streams(io.RawIOBase):
    """Compressed streams end to end; Python's own readers mistake damage after the first stream for the end."""

    def __init__(self, raw: IO[bytes], new: Callable[[], _Decompressor]):
        self._raw = raw
        self._new = new
        self._decompressor = new()
        self._has_started = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _read(self, size: int) -> bytes:
        while True:
            decompressor = self._decompressor
            if decompressor.eof:
                rest = decompressor.unused_data or self._raw.read(_CHUNK_BYTES)
                while rest and not rest.strip(b"\0"):  # padding, which xz allows
                    rest = self._raw.read(_CHUNK_BYTES)
                if not rest:
                    return b""
                self._decompressor = decompressor = self._new()
                chunk = rest.lstrip(b"\0")
            else:
                chunk = self._raw.read(_CHUNK_BYTES) if decompressor.needs_input else b""
                if not chunk and decompressor.needs_input:
                    if not self._has_started:
                        return b""  # an empty file
                    raise EOFError("truncated: the compressed stream has no end")
            self._has_started = True
            if content := decompressor.decompress(chunk, size):
                return content
