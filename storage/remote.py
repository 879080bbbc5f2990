"""Downloads files from fsspec URLs, verifying them on arrival and retrying failed transfers."""

import hashlib
import io
import random
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.config import conf

from triplane.storage.errors import StorageError

_CHUNK_BYTES = 8 << 20
_LONGEST_WAIT_S = 30


class Retry(NamedTuple):
    """Retry policy for failed transfers."""

    retries: int
    """Tries after the first."""
    timeout_s: float
    """A try fails after this long without a connection or another byte."""
    first_wait_s: float = 0.5
    """Wait before the second try; doubles with each further try, and is shortened at random by up to half."""


class TransferError(Exception):
    """One try failed."""


class _WrongContentError(TransferError):
    """The transfer completed with the wrong content."""


def is_url(location: object) -> bool:
    """True for `https://...`, `s3://...` and the like, False for a path."""
    return "://" in str(location)


def read_url(url: str, retry: Retry, *, most_bytes: int, sha256: str | None = None) -> bytes:
    """Returns the content of a file of at most `most_bytes`; raises StorageError as `download`."""
    buffer = io.BytesIO()
    download(url, buffer, retry, sha256=sha256, most_bytes=most_bytes)
    return buffer.getvalue()


def download(
    url: str,
    out: BinaryIO,
    retry: Retry,
    *,
    sha256: str | None = None,
    size_bytes: int | None = None,
    most_bytes: int | None = None,
) -> None:
    """Writes the content of `url` to `out`, and checks it against the checksum and sizes that are given.

    Each try starts at the first byte. After the last, raises StorageError with the reason for each failure.
    """
    failures: list[TransferError] = []
    for attempt in range(retry.retries + 1):
        if attempt:
            longest = min(_LONGEST_WAIT_S, retry.first_wait_s * 2 ** (attempt - 1))
            time.sleep(random.uniform(longest / 2, longest))
        try:
            _try(
                url,
                out,
                timeout_s=retry.timeout_s,
                sha256=sha256,
                size_bytes=size_bytes,
                most_bytes=most_bytes or size_bytes,
            )
            return
        except TransferError as error:
            failures.append(error)
    advice = "check the address, the server and the network, then start again"
    if all(isinstance(failure, _WrongContentError) for failure in failures):
        advice = "the file at the source is damaged: restore it or prepare the corpus again"
    happened = "; ".join(f"try {number}: {failure}" for number, failure in enumerate(failures, 1))
    raise StorageError(f"{url}: cannot be fetched: {happened}: {advice}") from failures[-1]


def _try(
    url: str, out: BinaryIO, *, timeout_s: float, sha256: str | None, size_bytes: int | None, most_bytes: int | None
) -> None:
    out.seek(0)
    hasher, received = hashlib.sha256(), 0
    for chunk in _chunks(url, timeout_s, size_bytes):
        hasher.update(chunk)
        received += len(chunk)
        if most_bytes is not None and received > most_bytes:
            raise _WrongContentError(f"more than {most_bytes:,} bytes")
        out.write(chunk)
    if size_bytes is not None and received < size_bytes:
        raise TransferError(f"cut after {received:,} of {size_bytes:,} bytes")
    if sha256 is not None and (found := hasher.hexdigest()) != sha256:
        raise _WrongContentError(f"expected SHA-256 {sha256[:12]}, found {found[:12]}")
    out.truncate(received)


def _chunks(url: str, timeout_s: float, size_bytes: int | None) -> Iterator[bytes]:
    protocol = url.partition("://")[0]
    try:
        # Not stored: a file system must not survive a fork, and fsspec caches one per process.
        files, path = fsspec.core.url_to_fs(url, **_options(protocol, timeout_s))
    except (ImportError, ValueError) as error:
        install = "pip install 'triplane[s3]'" if protocol == "s3" else "install fsspec's package for it"
        raise StorageError(f"{url}: {protocol}:// cannot be read here: {error}: {install}") from error
    # Block size 0 requests the whole body at once instead of in ranges. fsspec then ignores the size, but without one
    # it would send a HEAD first, and report any failure of that as FileNotFoundError.
    options = {"block_size": 0, "size": size_bytes or 1} if protocol.startswith("http") else {"cache_type": "none"}
    try:
        with files.open(path, "rb", **options) as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except Exception as error:  # each protocol's package raises its own exceptions
        raise TransferError(in_short(error)) from error


def _options(protocol: str, timeout_s: float) -> dict[str, Any]:
    """Returns options that end a transfer after `timeout_s` without progress, merged into the user's fsspec config."""
    configured = conf.get(protocol, {})
    match protocol:
        case "http" | "https":
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
            return {"client_kwargs": {**configured.get("client_kwargs", {}), "timeout": timeout}}
        case "s3" | "s3a":
            limits = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
            return {"config_kwargs": {**configured.get("config_kwargs", {}), **limits}, "use_listings_cache": False}
        case "gs" | "gcs":
            return {"requests_timeout": timeout_s}
    return {}


def in_short(error: Exception) -> str:
    """Describes an exception in one line."""
    if isinstance(error, TimeoutError):
        return "timed out"
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
